"""What the tests of the Kubernetes backend share: a loopback API server, a kubeconfig for it, and what was recorded."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server import ApiServer
from replay import RECORDINGS
from submitting import some_options

from dtrain.backends import kuberay


@pytest.fixture
def api() -> Iterator[ApiServer]:
    """A server with Ray's objects and the namespaces `default` and `dtrain`."""
    with ApiServer() as server:
        yield server


@pytest.fixture
def kubeconfig(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An administrator's kubeconfig for the server, as $KUBECONFIG of this process and those it starts."""
    path = api.kubeconfig(tmp_path / "kubeconfig")
    monkeypatch.setenv("KUBECONFIG", str(path))
    return path


@pytest.fixture
def options(kubeconfig: Path) -> kuberay.Options:
    """Of a cluster file that names the server by its context."""
    return some_options()


@pytest.fixture(scope="session")
def recordings() -> Path:
    if not RECORDINGS.is_dir():
        pytest.skip(f"what was recorded from a real cluster is not here: {RECORDINGS}")
    return RECORDINGS
