"""The doctor's ranks on this machine, sound and broken; what it starts and makes is gone when it has finished."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dtrain.doctor import ranks
from dtrain.machine import Machine

HERE = Path(__file__).parent
TWO_CORES = Machine(2, 8.0)
SILENCE_S = 6.0


@pytest.fixture(scope="module")
def forks():
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(HERE)
    findings = []
    with ranks.warm_process(findings) as started:
        yield started
    assert [f.area for f in findings] == ["zygote"]
    assert not started.folder.exists()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def check(forks, entry, limit_s=60.0):
    return ranks.World(forks, "cpu", 2, TWO_CORES, entry, limit_s).check()


def test_sound_ranks_are_healthy_and_measured(forks):
    found = check(forks, ranks.ENTRY)
    assert [f.area for f in found] == [f"{a} (gloo)" for a in ("rendezvous", *ranks.COLLECTIVES, "training")]
    assert {f.state for f in found} == {"ok"}
    assert all("MB/s with messages of 4 MiB" in f.text for f in found[1:7])
    assert "differ from one by" in found[-1].text


@pytest.mark.parametrize(
    ("entry", "limit_s", "area", "text", "reached"),
    [
        ("hangs", SILENCE_S, "all_gather", "ranks 0, 1 hung in all_gather: silent for 6 s", 2),
        ("is_killed", 60.0, "broadcast", "rank 1 was killed by signal 9 in broadcast", 4),
        ("raises", 60.0, "all_to_all", "rank 1 failed in all_to_all: ValueError: no such wire", 5),
        ("cannot_start", 60.0, "starting", "rank 0 left with code 1 in starting", 0),
    ],
)
def test_ranks_that_do_not_get_through(entry, limit_s, area, text, reached, forks):
    started = time.monotonic()
    found = check(forks, f"broken_ranks:{entry}", limit_s)
    assert time.monotonic() - started < 20.0
    assert [f.state for f in found] == ["ok"] * reached + ["problem"]
    assert found[-1].area == f"{area} (gloo)"
    assert text in found[-1].text
    assert found[-1].remedy


@pytest.mark.parametrize(
    ("entry", "area", "text"),
    [
        ("sends_wrong_numbers", "all_reduce", "wrong on rank 1: what arrived is not what was sent"),
        ("does_not_wait", "barrier", "it let ranks pass before the last had come"),
        ("keeps_gradients_to_itself", "training", "differ from one by"),
        ("does_not_train", "training", "weights moved by 0.0e+00"),
    ],
)
def test_ranks_that_come_to_something_wrong(entry, area, text, forks):
    found = {f.area: f for f in check(forks, f"broken_ranks:{entry}")}
    finding = found[f"{area} (gloo)"]
    assert finding.state == "problem"
    assert text in finding.text


def test_the_command_is_quick_and_leaves_nothing_behind(tmp_path):
    """Processes are told by their temporary folder, so that what others start meanwhile is not counted."""
    temporary = tmp_path / "t"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    if len(str(temporary)) > 20:  # pytest's folders are too long for Unix sockets; a link to one is not
        link = Path(f"/tmp/dt-{os.getpid()}")
        link.symlink_to(temporary)
        environment["TMPDIR"] = str(link)
    before = set(os.listdir("/dev/shm"))
    started = time.monotonic()
    try:
        result = subprocess.run(
            [sys.executable, "-m", "dtrain", "doctor", "--json"],
            env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path,
        )  # fmt: skip
    finally:
        if "dt-" in environment["TMPDIR"]:
            Path(environment["TMPDIR"]).unlink()
    took = time.monotonic() - started
    found = json.loads(result.stdout)
    assert result.returncode == 0, (result.stderr, [f for f in found if f["state"] == "problem"])
    assert {"all_reduce (gloo)", "training (gloo)"} <= {f["area"] for f in found}
    assert took < 30.0
    assert [p.name for p in temporary.iterdir() if not p.name.startswith("torchinductor_")] == []  # torch's own cache
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert set(os.listdir("/dev/shm")) - before == set()
    assert _processes_with(environment["TMPDIR"]) == []


def _processes_with(word):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if word.encode() in (entry / "environ").read_bytes():
                    found.append((entry.name, (entry / "cmdline").read_bytes()))
            except OSError:
                continue
    return found
