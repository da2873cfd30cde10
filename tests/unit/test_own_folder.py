"""The folder that a process works in is its own: nobody else can have put code there."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from dtrain.errors import StorageError
from dtrain.runtime.own_folder import GOING, LEAVING_S, OwnFolder, base, code_folder, is_going, make_base, node_folder

SERVES = """
import fcntl, sys
with open(sys.argv[1], "r+b") as lock:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    print(flush=True)
    sys.stdin.read()
"""


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


def test_one_that_is_given_back_while_the_next_waits_for_it_is_made_anew(temporary: Path) -> None:
    first = OwnFolder("gpt-k3f9", 1, "0")
    made: list[OwnFolder] = []
    waiting = threading.Thread(target=lambda: made.append(OwnFolder("gpt-k3f9", 1, "0")))
    waiting.start()
    waiting.join(0.3)
    assert not made
    first.remove()
    waiting.join(10)
    assert (made[0].path / "logs").is_dir()
    assert os.path.samestat(os.stat(made[0].path / "lease"), os.fstat(made[0].lock))
    made[0].remove()
    assert not (base() / "runs").exists()


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(temporary: Path) -> None:
    left, used = OwnFolder("gpt-left", 1, "0"), OwnFolder("gpt-used", 1, "0")
    for name in ("gpt-left", "gpt-used"):
        code_folder(name).mkdir(parents=True)
    os.close(left.lock)
    other = OwnFolder("gpt-other", 1, "1")
    assert not left.path.exists() and not code_folder("gpt-left").exists()
    assert (used.path / "logs").is_dir() and code_folder("gpt-used").is_dir()
    for folder in (other, used):
        folder.remove()
    assert [path.name for path in base().glob("*")] == []


def test_a_node_that_was_to_go_and_stayed_takes_runs_again(temporary: Path) -> None:
    assert not is_going()
    command = [sys.executable, "-m", "dtrain.runtime.preempted", "--within", "20"]
    subprocess.run(command, check=True, timeout=15, env={**os.environ, "TMPDIR": str(temporary)})
    flag = base() / GOING
    assert is_going()
    for age_s, goes in ((19 + LEAVING_S, True), (21 + LEAVING_S, False), (-21 - LEAVING_S, False)):
        os.utime(flag, (time.time() - age_s,) * 2)
        assert is_going() == goes, age_s
    flag.write_text("")
    assert not is_going()


def test_the_zygotes_folder_of_a_node_that_has_gone_is_removed(temporary: Path) -> None:
    make_base()
    gone = subprocess.Popen(["true"])
    gone.wait()
    here, dead, served = (base() / f"node-{pid}" for pid in (os.getpid(), gone.pid, 2**22 + 1))
    for folder in (here, dead, served, base() / "node-of-another-kind"):
        folder.mkdir()
        (folder / "zygote-1-2.lock").touch()
    command = [sys.executable, "-c", SERVES, str(served / "zygote-1-2.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as zygote:
        zygote.stdout.readline()
        assert node_folder(os.getpid()) == here
        assert sorted(path.name for path in base().glob("node-*")) == sorted(
            ["node-of-another-kind", here.name, served.name]
        )
        zygote.stdin.close()
    node_folder(os.getpid())
    assert not served.exists() and here.is_dir()
