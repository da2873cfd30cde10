"""One embedded cluster for all tests here."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from desk import Desk, replace_zygote

from dtrain.runs import Run


@pytest.fixture(scope="session")
def desk() -> Iterator[Desk]:
    root = Path(tempfile.mkdtemp(prefix="dt-"))
    desk = Desk(root)
    desk.dtrain("cluster", "up", "-c", str(desk.cluster))
    zygote = replace_zygote(desk)
    try:
        yield desk
    finally:
        desk.dtrain("cluster", "down", "-c", str(desk.cluster), check=False)
        zygote.kill()
        zygote.wait()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def undisturbed(desk: Desk) -> Run:
    run, _ = desk.submit()
    assert run.record.state == "succeeded", run.record
    return run
