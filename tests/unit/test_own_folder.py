"""The folder that a process works in is its own: nobody else can have put code there."""

import os
import tempfile
from pathlib import Path

import pytest

from dtrain.errors import StorageError
from dtrain.runtime.own_folder import OwnFolder, base, code_folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_it_is_closed_to_others_and_gone_in_the_end(temporary: Path) -> None:
    folder = OwnFolder("gpt-k3f9", 1, "driver")
    assert folder.path.is_dir() and base().parent == temporary
    assert base().stat().st_mode & 0o777 == 0o700
    folder.remove()
    assert not (base() / "runs").exists()


def test_a_folder_that_somebody_else_has_put_there_is_refused(temporary: Path) -> None:
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (temporary / f"dtrain-{os.getuid()}").symlink_to(elsewhere)
    with pytest.raises(StorageError, match="belongs to somebody else"):
        code_folder("gpt-k3f9")
    with pytest.raises(StorageError, match="TMPDIR"):
        OwnFolder("gpt-k3f9", 1, "driver")
