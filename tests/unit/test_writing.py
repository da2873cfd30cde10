"""What the agent says of its checkpoint writer's answers; the writer itself runs in tests/ray."""

import os
import selectors
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from making import a_plan

from dtrain import runs
from dtrain.messages import receive, send
from dtrain.runtime.writing import CheckpointWriter

WRITTEN = {"bytes": 5_000_000, "seconds": 0.25, "deleted": [], "refused": ""}


class Forked:
    """In the place of a zygote and of what it forks: hears requests, and answers what a test says."""

    def fork(self, entry: str, args: Any, descriptors: Sequence[int], *_: Any, **__: Any) -> "Forked":
        self.channel = socket.socket(fileno=os.dup(descriptors[0]))
        self.pidfd = os.open("/dev/null", os.O_RDONLY)
        return self

    def kill(self) -> None:
        self.channel.close()


class Desk:
    def __init__(self, folder: Path) -> None:
        self.run = runs.create(a_plan(storage=str(folder)), "")
        self.selector, self.zygote, self.said, self.num_free = selectors.DefaultSelector(), Forked(), [], 0
        self.writer = CheckpointWriter(
            self.run, self.run.plan, 0, folder / "snapshot", self.selector, self._free, self._tell, None
        )

    def _free(self) -> None:
        self.num_free += 1

    def _tell(self, kind: str, message: str, **facts: Any) -> None:
        self.said.append((kind, message))

    def write(self, step: int, **answer: Any) -> None:
        self.writer.write(self.zygote, step, 1, {}, "")  # type: ignore[arg-type]
        assert receive(self.zygote.channel)["step"] == step
        send(self.zygote.channel, answer)
        for key, _ in self.selector.select(5):
            key.data()


@pytest.fixture
def desk(tmp_path: Path) -> Any:
    made = Desk(tmp_path)
    yield made
    made.writer.drop()
    made.selector.close()


def test_what_is_written_or_failed_is_told_and_frees_the_snapshot(desk: Desk) -> None:
    desk.write(10, written=10, **WRITTEN)
    desk.write(20, failed=20, reason="the disk is full")
    assert desk.said == [
        ("checkpoint", "checkpoint of step 10 (5.0 MB in 0.2 s)"),
        (
            "checkpoint-failed",
            "checkpoint of step 20 failed: the disk is full; the one before stays valid, training goes on",
        ),
    ]
    assert desk.writer.last_failure == "the disk is full"
    desk.write(30, written=30, **WRITTEN)
    assert desk.writer.last_failure == ""
    assert desk.num_free == 3


def test_that_older_ones_cannot_be_deleted_is_told_once(desk: Desk) -> None:
    refused = {**WRITTEN, "refused": "s3:DeleteObject is not allowed"}
    for step, answer in ((10, refused), (20, refused), (30, WRITTEN), (40, refused)):
        desk.write(step, written=step, **answer)
    told = [message for kind, message in desk.said if kind == "not-deleted"]
    assert told == ["older checkpoints stay, and take space: s3:DeleteObject is not allowed"] * 2
    assert [kind for kind, _ in desk.said].index("not-deleted") == 1
