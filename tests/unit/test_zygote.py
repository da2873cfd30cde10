"""The process ranks are forked from: what it gives its children, and that none of them is ever left behind."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dtrain import fingerprint
from dtrain.errors import ClusterError
from dtrain.messages import pair, receive
from dtrain.runtime import zygote as module
from dtrain.runtime.zygote import Zygote

HERE = Path(__file__).parent
PATIENCE_S = 20.0
LIGHT = """
import os, sys
from dtrain.runtime import zygote_server
def refuse():
    raise BlockingIOError(11, "Resource temporarily unavailable")
fork = os.fork
os.fork = lambda: refuse() if os.path.exists(sys.argv[1] + "/full") else fork()
zygote_server.PRELOAD, zygote_server.REACHABLE_CHECK_S = ("json",), 0.1
zygote_server.main()
"""


class Serving:
    """A zygote without torch, of a process that stands for the cluster it must not outlive."""

    def __init__(self, folder):
        self.folder = folder
        self.cluster = subprocess.Popen(["sleep", "600"])
        self.log = open(folder / "log", "ab")  # noqa: SIM115
        self._started = []
        self.process = self.start()

    def start(self):
        process = subprocess.Popen(
            [sys.executable, "-c", LIGHT, str(self.folder), "--until", str(self.cluster.pid)],
            env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"},
            stdout=self.log,
            stderr=self.log,
        )
        self._started.append(process)
        return process

    @property
    def socket(self):
        return next(self.folder.glob("*.sock"), self.folder / "none")

    def connect(self):
        deadline = time.monotonic() + PATIENCE_S
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.connect(str(self.socket))
                return Zygote(connection)
            except OSError:
                connection.close()
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.01)

    def close(self):
        for process in (*self._started, self.cluster):
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
        self.log.close()


@pytest.fixture
def serving():
    with tempfile.TemporaryDirectory(prefix="dtz-") as folder:  # pytest's own are too long for Unix sockets
        started = Serving(Path(folder))
        yield started
        started.close()


@pytest.fixture
def zygote(serving):
    connection = serving.connect()
    yield connection
    connection.close()


@pytest.fixture
def log(tmp_path):
    with open(tmp_path / "log", "ab+", buffering=0) as file:
        yield file


def until(condition, timeout_s=PATIENCE_S):
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def is_alive(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def fork(zygote, entry, log, **args):
    return zygote.fork(f"forked:{entry}", args, [], log.fileno(), "child")


# -- a child ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 7])
def test_a_child_prints_to_its_log_and_leaves_with_its_code(code, zygote, log):
    for entry in ("leave_with", "exit_with"):
        child = fork(zygote, entry, log, code=code)
        assert zygote.wait(child, PATIENCE_S) == code
        assert not child.is_alive
        os.close(child.pidfd)
    log.seek(0)
    assert sorted(log.read().split(b"\n")) == [b"", b"said on stderr", b"said on stdout"]


def test_a_child_that_raises_leaves_a_traceback_in_its_log(zygote, log):
    child = fork(zygote, "fail", log)
    assert zygote.wait(child, PATIENCE_S) == 1
    log.seek(0)
    assert b"ValueError: no such thing" in log.read()
    os.close(child.pidfd)


@pytest.mark.parametrize("entry", ["no_such_function", "no_such_module"])
def test_an_entry_that_is_not_there(entry, zygote, log):
    child = zygote.fork(f"{'nowhere' if 'module' in entry else 'forked'}:{entry}", {}, [], log.fileno(), "x")
    assert zygote.wait(child, PATIENCE_S) == 1
    os.close(child.pidfd)


def test_a_killed_child_says_by_which_signal(zygote, log):
    child = fork(zygote, "wait", log)
    assert child.is_alive
    assert zygote.wait(child, 0.05) is None
    child.kill()
    assert zygote.wait(child, PATIENCE_S) == -signal.SIGKILL
    child.kill()  # once more is no harm
    os.close(child.pidfd)


def test_what_is_said_of_other_children_meanwhile_is_kept(zygote, log):
    children = [fork(zygote, "leave_with", log, code=code) for code in range(20)]
    for code, child in reversed(list(enumerate(children))):
        assert zygote.wait(child, PATIENCE_S) == code
        os.close(child.pidfd)


def test_a_child_has_its_name_descriptors_and_nothing_of_the_zygote(serving, zygote, log):
    other = serving.connect()  # whose connection the child must not inherit
    ours, theirs = pair()
    with theirs:
        child = zygote.fork(
            "forked:tell", {"a": [1, "ä"]}, [theirs.fileno(), log.fileno()], log.fileno(), "rank-3", nice=5
        )
    found = receive(ours)
    assert found["pid"] == child.pid
    assert found["parent"] == serving.process.pid
    assert (found["name"], found["nice"], found["args"]) == ("rank-3", 5, {"a": [1, "ä"]})
    assert found["descriptors"] == 2
    assert found["sockets"] == 1
    ours.close()
    assert zygote.wait(child, PATIENCE_S) == 0
    os.close(child.pidfd)
    other.close()


# -- clients that go -------------------------------------------------------------------------------------------


def with_client(serving, zygote, log, tmp_path, seconds=600):
    """A client process, the child that goes with it, and the one that lives on."""
    ours, theirs = pair()
    args = {"socket": str(serving.socket), "cleanup": f"{tmp_path}/shared-*", "seconds": seconds}
    with theirs:
        client = zygote.fork("forked:be_client", args, [theirs.fileno()], log.fileno(), "client")
    with ours:
        return client, receive(ours)["pids"]


def test_a_client_that_is_killed_takes_its_children_with_it_but_those_that_outlive(serving, zygote, log, tmp_path):
    for name in ("shared-state", "shared-control", "other"):
        (tmp_path / name).touch()
    client, (child, outliving) = with_client(serving, zygote, log, tmp_path)
    client.kill()
    assert until(lambda: not is_alive(child))
    time.sleep(0.1)
    assert is_alive(outliving)
    assert (tmp_path / "shared-state").exists()
    os.kill(outliving, signal.SIGKILL)
    assert until(lambda: not (tmp_path / "shared-state").exists())
    assert until(lambda: not (tmp_path / "shared-control").exists())
    assert (tmp_path / "other").exists()
    assert zygote.wait(client, PATIENCE_S) == -signal.SIGKILL
    os.close(client.pidfd)


def test_what_its_client_may_still_want_is_not_cleaned_up(zygote, log, tmp_path):
    (tmp_path / "shared-state").touch()
    child = zygote.fork("forked:leave_with", {"code": 3}, [], log.fileno(), "x", cleanup=f"{tmp_path}/shared-*")
    assert zygote.wait(child, PATIENCE_S) == 3
    time.sleep(0.1)
    assert (tmp_path / "shared-state").exists()
    os.close(child.pidfd)


def test_a_client_that_closes_its_connection_takes_its_children_with_it(serving, log):
    connection = serving.connect()
    child = fork(connection, "wait", log)
    connection.close()
    assert until(lambda: not is_alive(child.pid))
    os.close(child.pidfd)
    assert serving.process.poll() is None


# -- the zygote's own end ----------------------------------------------------------------------------------------


def test_a_killed_zygote_takes_its_children_with_it_and_its_clients_learn(serving, zygote, log):
    child = fork(zygote, "wait", log)
    assert zygote.is_alive
    serving.process.kill()
    assert until(lambda: not is_alive(child.pid))
    assert zygote.wait(child, PATIENCE_S) == -signal.SIGKILL
    assert not zygote.is_alive
    with pytest.raises(ClusterError, match="the zygote is gone"):
        fork(zygote, "wait", log)
    os.close(child.pidfd)


def test_it_ends_with_its_cluster_when_nobody_is_connected(serving):
    serving.connect().close()
    assert is_alive(serving.process.pid)
    serving.cluster.kill()
    serving.cluster.wait()
    assert serving.process.wait(PATIENCE_S) == 0
    assert not list(serving.folder.glob("*.sock"))


def test_it_ends_when_nobody_can_reach_it_any_more(serving, zygote, log):
    child = fork(zygote, "wait", log, seconds=600)
    serving.socket.unlink()
    with pytest.raises(subprocess.TimeoutExpired):
        serving.process.wait(0.5)
    assert child.is_alive
    zygote.close()
    assert serving.process.wait(PATIENCE_S) == 0
    os.close(child.pidfd)


def test_clients_may_finish_when_the_cluster_has_gone(serving, zygote, log):
    child = fork(zygote, "wait", log, seconds=600)
    serving.cluster.kill()
    serving.cluster.wait()
    time.sleep(0.2)
    assert child.is_alive
    assert serving.process.poll() is None
    zygote.close()
    assert serving.process.wait(PATIENCE_S) == 0
    assert until(lambda: not is_alive(child.pid))
    os.close(child.pidfd)


def test_a_cluster_that_is_gone_already(serving):
    serving.connect().close()
    serving.process.kill()
    serving.process.wait()
    serving.cluster.kill()
    serving.cluster.wait()
    again = serving.start()
    assert again.wait(PATIENCE_S) == 0
    assert not list(serving.folder.glob("*.sock"))


def test_a_second_one_ends_by_itself_and_the_first_goes_on_serving(serving, zygote, log):
    second = serving.start()
    assert second.wait(PATIENCE_S) == 0
    child = fork(zygote, "leave_with", log, code=4)
    assert zygote.wait(child, PATIENCE_S) == 4
    os.close(child.pidfd)
    serving.connect().close()


def test_after_a_crash_the_next_one_takes_the_place(serving, log):
    serving.connect().close()
    serving.process.kill()
    serving.process.wait()
    assert serving.socket.exists()  # what the killed one left behind
    serving.process = serving.start()
    connection = serving.connect()
    child = fork(connection, "leave_with", log, code=2)
    assert connection.wait(child, PATIENCE_S) == 2
    os.close(child.pidfd)
    connection.close()


def test_a_client_that_says_nonsense_ends_only_itself(serving, zygote, log):
    """One broken client of a node must not end the ranks of all others."""
    for words in (b"", b"not json", b"[]", b'{"entry": "x"}', b"\xff" * 100):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(str(serving.socket))
        if words:
            connection.send(words)
        connection.close()
    child = fork(zygote, "leave_with", log, code=6)
    assert zygote.wait(child, PATIENCE_S) == 6
    os.close(child.pidfd)


def test_no_room_for_another_process_is_an_error_of_its_client_alone(serving, zygote, log):
    before = fork(zygote, "wait", log)
    (serving.folder / "full").touch()
    with pytest.raises(ClusterError, match=r"cannot fork child \(Resource temporarily unavailable\)"):
        fork(zygote, "leave_with", log, code=0)
    (serving.folder / "full").unlink()
    child = fork(zygote, "leave_with", log, code=5)
    assert zygote.wait(child, PATIENCE_S) == 5
    assert before.is_alive
    for descriptor in (before.pidfd, child.pidfd):
        os.close(descriptor)


def test_too_many_arguments_are_refused_by_the_client(zygote, log):
    with pytest.raises(ClusterError):
        fork(zygote, "leave_with", log, code=0, text="x" * module.MAX_MESSAGE * 4)


# -- connecting --------------------------------------------------------------------------------------------------


def test_one_that_cannot_start_is_an_error_that_names_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "start", lambda folder, until: subprocess.Popen([sys.executable, "-c", "exit(3)"]))
    with pytest.raises(ClusterError, match=r"ended with 3; see .*zygote.log"):
        Zygote.connect(tmp_path, os.getpid())


def test_one_that_does_not_come_up_in_time(tmp_path, monkeypatch):
    process = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(module, "start", lambda folder, until: process)
    try:
        with pytest.raises(ClusterError, match="did not come up in 0 s"):
            Zygote.connect(tmp_path, os.getpid(), timeout_s=0.2)
    finally:
        process.kill()
        process.wait()


def test_a_socket_is_named_by_the_code_and_by_the_cluster(tmp_path):
    first = module.socket_path(tmp_path, 17)
    assert first == module.socket_path(tmp_path, 17)
    assert fingerprint.of_code() in first.name
    assert first != module.socket_path(tmp_path, 18)


def test_the_fingerprint_changes_with_any_file_of_the_code(tmp_path):
    package = tmp_path / "dtrain"
    package.mkdir()
    source = Path(fingerprint.__file__).read_text()
    (package / "__init__.py").write_text("")
    (package / "fingerprint.py").write_text(source)
    (package / "inner").mkdir()
    (package / "inner" / "a.py").write_text("x = 1\n")

    def word():
        code = "from dtrain import fingerprint; print(fingerprint.of_code())"
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    words = [word(), word()]
    assert words[0] == words[1]
    assert len(words[0]) == 12
    (package / "inner" / "a.py").write_text("x = 22\n")
    words.append(word())
    (package / "inner" / "b.py").write_text("")
    words.append(word())
    os.rename(package / "inner" / "b.py", package / "inner" / "c.py")
    words.append(word())
    assert len(set(words)) == 4


def test_a_zygote_of_older_code_leaves_for_a_newer_one_when_its_clients_have(tmp_path: Path) -> None:
    path = module.socket_path(tmp_path, os.getpid())

    def started() -> subprocess.Popen[bytes]:
        process = module.start(tmp_path, os.getpid())
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return process

    older = started()
    client = Zygote.connect(tmp_path, os.getpid())
    path.rename(path.with_name(f"zygote-0123456789ab-{os.getpid()}.sock"))
    (tmp_path / f"{path.stem}.lock").unlink()
    newer = started()
    try:
        time.sleep(0.2)
        assert older.poll() is None, "a client is left"
        client.close()
        assert older.wait(10) == 0
        assert newer.poll() is None
    finally:
        for process in (older, newer):
            process.kill()
            process.wait()
