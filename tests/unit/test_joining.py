"""A driver that waits is there for the next run, whatever becomes of those who ask."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dtrain.runtime.joining import await_run


def call(folder: Path) -> socket.socket:
    deadline = time.monotonic() + 10
    while not (found := list(folder.glob("driver-*.sock"))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    while connection.connect_ex(str(found[0])):
        assert time.monotonic() < deadline
    return connection


def test_who_does_not_wait_for_the_answer_does_not_end_the_driver(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(await_run, tmp_path, -1)
        with call(tmp_path), call(tmp_path) as impatient:  # the first is asked what it wants, and says nothing
            impatient.send(b"/runs/first")
            impatient.close()
        with call(tmp_path) as next_one:
            next_one.send(b"/runs/second")
            assert next_one.recv(16) == b"taken"
        assert waiting.result(10) == Path("/runs/second")
    assert not list(tmp_path.iterdir())
