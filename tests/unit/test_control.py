"""The block of shared memory with which the agent and the ranks of a node agree."""

import subprocess
import sys
import time

import pytest

from dtrain.runtime.control import Control

WORDS = ("stop", "last_step", "snapshot_step", "writing_step")


@pytest.fixture
def control(tmp_path):
    return Control.create(tmp_path / "control", 4)


def test_a_fresh_block_says_nothing(control):
    assert [getattr(control, word) for word in WORDS] == [0, 0, 0, 0]
    assert [control.last_beat(rank) for rank in range(4)] == [None] * 4


def test_words_and_beats_do_not_touch_each_other(control):
    for number, word in enumerate(WORDS, 1):
        setattr(control, word, number << 40)
    for rank in range(4):
        control.beat(rank, step=100 + rank, micro=rank, phase=rank + 1)
    assert [getattr(control, word) for word in WORDS] == [number << 40 for number in range(1, 5)]
    beats = [control.last_beat(rank) for rank in range(4)]
    assert [(b.step, b.micro, b.phase) for b in beats] == [(100 + r, r, r + 1) for r in range(4)]


def test_a_beat_carries_the_clock_all_processes_share(control):
    before = time.monotonic()
    control.beat(2, 1, 0, 0)
    assert before <= control.last_beat(2).time <= time.monotonic()


def test_another_process_sees_it_and_is_seen(control, tmp_path):
    control.snapshot_step = 12
    code = (
        "import sys; from pathlib import Path; from dtrain.runtime.control import Control\n"
        "control = Control.open(Path(sys.argv[1])); print(control.snapshot_step, control.last_beat(0))\n"
        "control.beat(3, 13, 1, 2); control.stop = 1"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "control")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == ["12", "None"]
    assert control.stop == 1
    assert control.last_beat(3).step == 13


def test_the_next_attempt_starts_clean(control, tmp_path):
    control.stop = 1
    control.beat(0, 5, 0, 0)
    again = Control.create(tmp_path / "control", 2)
    assert again.stop == 0
    assert again.last_beat(0) is None


def test_a_world_that_shrinks_and_grows_has_room_for_every_rank(tmp_path):
    for num_ranks in (8, 1, 16):
        control = Control.create(tmp_path / "control", num_ranks)
        control.beat(num_ranks - 1, 3, 0, 0)
        assert Control.open(tmp_path / "control").last_beat(num_ranks - 1).step == 3
