"""A person at a terminal with an embedded cluster, whose zygote can be told to let a worker fail at an exact step."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dtrain import runs
from dtrain.backends import local
from dtrain.errors import InputError
from dtrain.runs import Run

HERE = Path(__file__).parent
JOB = HERE / "job.yaml"


class Desk:
    """What a person at a terminal would do, and where to look afterwards."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.storage = root / "runs"
        self.faults = root / "faults"
        self.home = root / "home"
        self.cluster = root / "cluster.yaml"
        self.faults.mkdir(parents=True)
        self.cluster.write_text(f"name: here\nbackend: {{name: local, home: {self.home}}}\nstorage: {self.storage}\n")
        self.options = local.Options(home=str(self.home))

    def dtrain(self, *words: str, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dtrain", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=self.root, check=False)
        if check and done.returncode:
            raise AssertionError(f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def submit(
        self, *settings: str, detach: bool = False, check: bool = True
    ) -> tuple[Run, subprocess.CompletedProcess]:
        words = ["submit", str(JOB), "-c", str(self.cluster)]
        for setting in settings:
            words += ["--set", setting]
        done = self.dtrain(*words, *(["--detach"] if detach else []), check=check)
        return runs.list_runs(self.storage)[-1], done

    def fault(self, what: str, *, batch: int, rank: int = 1, of: str = "train") -> None:
        (self.faults / f"{rank}.json").write_text(json.dumps({"of": of, "batch": batch, "do": what}))

    def until(self, run: Run, condition: Callable[[runs.Record], bool], timeout: float = 60) -> runs.Record:
        deadline = time.monotonic() + timeout
        while not condition(record := run.record):
            if time.monotonic() > deadline:
                self._give_up(run)
                story = "\n".join(map(str, run.events()))
                logs = "\n".join(f"{p.name}:\n{p.read_text()[-2000:]}" for p in run.logs.glob("*.log"))
                raise AssertionError(f"{run.id} is {record.state} ({record.cause})\n{story}\n{logs}")
            time.sleep(0.02)
        return record

    def _give_up(self, run: Run) -> None:
        """Let the workers write down where they are, and the next test have the cores."""
        if run.record.ended:
            return
        with contextlib.suppress(AssertionError, OSError, InputError):
            for number in range(run.plan.workers.total):
                kill(pid_of(run, f"rank-{number}"), signal.SIGUSR2)
        time.sleep(0.5)
        self.dtrain("stop", run.id, "--storage", str(self.storage), "--timeout", "40", check=False)

    def ended(self, run: Run, timeout: float = 60) -> runs.Record:
        return self.until(run, lambda record: record.ended, timeout)

    def step(self, run: Run) -> int:
        return max((line.get("step", 0) for line in run.metrics()), default=0)

    def until_step(self, run: Run, step: int) -> None:
        self.until(run, lambda record: record.ended or self.step(run) >= step)
        assert not run.record.ended, run.record

    def tell(self, run: Run, event: str) -> list[str]:
        return [e.get("message", "") for e in run.events() if e["event"] == event]


def replace_zygote(desk: Desk) -> subprocess.Popen[bytes]:
    """The cluster's zygote gives its place to the one that can be told to fail."""
    folder = local._Home(desk.options).folder
    os.kill(int((folder / "zygote.pid").read_text()), signal.SIGKILL)
    (socket,) = folder.glob("zygote-*.sock")
    socket.unlink()
    head = local.cluster_status(desk.options)["pid"]
    command = [sys.executable, str(HERE / "faulty_zygote.py"), str(folder), str(desk.faults), str(head)]
    with (desk.root / "zygote.log").open("wb") as log:
        zygote = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(folder.glob("zygote-*.sock")):
        assert time.monotonic() < deadline, (desk.root / "zygote.log").read_text()
        time.sleep(0.05)
    return zygote


def pid_of(run: Run, name: str) -> int:
    """The process of this run whose short name is `name` (rank-1, agent-0), found as `ps` would."""
    path = str(run.path)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "comm").read_text().strip() != name:
                    continue
                maps = (entry / "maps").read_text()
                links = [os.readlink(link) for link in (entry / "fd").iterdir()]
            except OSError:
                continue
            from dtrain.checkpoint.shared_memory import prefix

            if prefix(run.path, 0) in maps or any(link.startswith(path) for link in links):
                return int(entry.name)
    raise AssertionError(f"{name} of {run.id} is not running")


def kill(pid: int, signum: int = signal.SIGKILL) -> None:
    os.kill(pid, signum)
