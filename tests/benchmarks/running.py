"""Processes that are measured: a cluster of the benchmark's own, dtrain's runs on it, and the rivals' scripts."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from dtrain.backends import local
from dtrain.data import cache
from dtrain.plan import Plan
from dtrain.planning import make_plan
from dtrain.runs import Run, iterate_lines, read_lines
from dtrain.spec import load
from tests.benchmarks.harness import JOBS, RIVALS, ROOT

DTRAIN = str(Path(sys.executable).with_name("dtrain"))
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
SERVERS = ROOT / "tests" / "kubernetes"
CLUSTER = """\
name: bench
backend: {{name: local, home: {home}}}
device: cpu
workers_per_node: 2
storage: {storage}
"""
LONG_S = 180.0


def seconds(command: Sequence[str], **words: Any) -> float:
    """How long a command takes, from before its process is made to its end. Raises when it fails."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **words)
    return time.perf_counter() - started


def with_kubernetes() -> None:
    """Let the API server of the tests be imported: they are no package."""
    if str(SERVERS) not in sys.path:
        sys.path.insert(0, str(SERVERS))


@contextlib.contextmanager
def workplace() -> Iterator["Workplace"]:
    """A temporary folder with a cluster of its own, of which nothing is left afterwards."""
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-", ignore_cleanup_errors=True) as folder:
        place = Workplace(Path(folder))
        try:
            yield place
        finally:
            place.down()


class Workplace:
    """Where benchmarks run: a cluster file, its home and its runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.storage = folder / "runs"
        self.cluster = folder / "cluster.yaml"
        self.cluster.write_text(CLUSTER.format(home=folder / "home", storage=self.storage))
        self._home = local._Home(local.Options(home=str(folder / "home")))

    def plan(self, job: str, *overrides: str) -> Plan:
        file = JOBS / f"{job}.yaml"
        return make_plan(*load.load_both(file, self.cluster, overrides))

    def submit(self, job: str, *overrides: str) -> "Submitted":
        """Start `dtrain submit`, as a user does; its time runs from just before its process is made."""
        words = [DTRAIN, "submit", str(JOBS / f"{job}.yaml"), "-c", str(self.cluster)]
        words += [word for text in overrides for word in ("--set", text)]
        before = set(self.storage.glob("*")) if self.storage.exists() else set()
        log = (self.folder / "submit.log").open("ab")
        started = time.time()
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder)
        log.close()

        def made() -> list[Path]:
            return [p for p in self.storage.glob("*") if p not in before and (p / "run.json").exists()]

        await_(made, 60.0, f"dtrain submit made no run; see {self.folder / 'submit.log'}")
        return Submitted(Run(made()[0]), process, started)

    def up(self) -> None:
        """The cluster runs, and a driver waits: what a user finds who has submitted before."""
        subprocess.run([DTRAIN, "cluster", "up", "-c", str(self.cluster)], check=True, capture_output=True)
        self.settle()

    def settle(self) -> None:
        """Until a driver waits for the next run, and what the last one started has ended."""
        await_(lambda: list(self._home.folder.glob("driver-*.sock")), LONG_S, "no driver waits")
        time.sleep(1.0)

    def down(self) -> None:
        subprocess.run([DTRAIN, "cluster", "down", "-c", str(self.cluster)], check=False, capture_output=True)

    def ranks(self) -> dict[str, int]:
        """Pids of the ranks that live, by name (`rank-0`)."""
        zygote = int((self._home.folder / "zygote.pid").read_text())
        return {name: pid for pid, name in children(zygote).items() if name.startswith("rank-")}


class Submitted:
    """A run under way."""

    def __init__(self, run: Run, process: subprocess.Popen[bytes], started: float) -> None:
        self.run, self.process, self.started = run, process, started

    def steps(self) -> list[dict[str, Any]]:
        """Metrics of steps, in the order they were completed."""
        return [line for line in self.run.metrics() if "loss" in line]

    def await_step(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float = LONG_S) -> dict[str, Any]:
        """The first completed step for which `condition` holds; its `time` is when the agent wrote it down."""
        tail = Tail(self.run.path / "metrics.jsonl")
        return tail.find(lambda line: "loss" in line and condition(line), timeout_s)

    def wait(self) -> None:
        """To its end, which must be a good one."""
        code = self.process.wait(600)
        if code != 0:
            raise RuntimeError(f"{self.run.id} ended with {code}: {self.run.record.cause}")

    def stop(self) -> None:
        """End it from outside, as one whose figures have been taken."""
        self.run.ask_to_stop("the benchmark")
        self.process.wait(60)


class Script:
    """A rival: a command that appends one JSON line to `log` for each step it has completed."""

    def __init__(
        self, command: list[str], log: Path, config: Mapping[str, Any], environment: Mapping[str, str]
    ) -> None:
        self._log = log
        self._output = log.with_suffix(".out")
        self._config = log.with_suffix(".json")
        self._config.write_text(json.dumps({**config, "log": str(log)}))
        with self._output.open("wb") as output:
            self.started = time.time()
            self.process = subprocess.Popen(
                [*command, str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **environment},
                start_new_session=True,
                cwd=ROOT,
            )

    def await_step(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float = LONG_S) -> dict[str, Any]:
        try:
            return Tail(self._log).find(condition, timeout_s)
        except TimeoutError:
            words = self._output.read_text(errors="replace")[-2000:]
            raise TimeoutError(f"no such step of {self._log.name} within {timeout_s:g} s; it said: {words}") from None

    def lines(self) -> list[dict[str, Any]]:
        return read_lines(self._log)

    def end(self) -> None:
        """End all it started: its ranks outlive their launcher."""
        family = {*descendants(self.process.pid), *session_members(self.process.pid), *named(str(self._config))}
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        await_(lambda: not family & {pid for pid, fields, _ in processes() if fields[0] != "Z"}, 30.0, "still there")


def torchrun(log: Path, config: Mapping[str, Any], max_restarts: int = 0) -> Script:
    """The hand-written DDP script under torchrun, on two workers, looking for no name on the network."""
    command = [TORCHRUN, "--standalone", "--nproc-per-node=2", f"--max-restarts={max_restarts}"]
    command += ["--local-addr=127.0.0.1", "--monitor-interval=0.05", str(RIVALS / "ddp.py")]
    return Script(command, log, config, {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"})


def ray_train(log: Path, config: Mapping[str, Any]) -> Script:
    """The same model under Ray Train, which looks after its workers as often as it can."""
    environment = {
        "GLOO_SOCKET_IFNAME": "lo",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
        "RAY_TRAIN_V2_ENABLED": "1",
        "PYTHONPATH": str(ROOT),
    }
    return Script([sys.executable, str(RIVALS / "ray_train.py")], log, config, environment)


def rival_config(plan: Plan, **changes: Any) -> dict[str, Any]:
    """What a rival must know to train the same model on the same data: plain values, and the prepared tokens."""
    from dtrain.data import text

    source = text.open(plan.data, cache.folder())  # type: ignore[arg-type]
    model: Any = plan.model
    optimizer: Any = plan.optimizer
    return {
        "tokens": str(cache.folder() / source.fingerprint / "train.bin"),
        "model": {**to_builtins(model), "hidden": model.hidden},
        "vocabulary_size": source.separator + 1,
        "padded": model.padded(source.separator + 1),
        "sequence_length": plan.data.sequence_length,  # type: ignore[attr-defined]
        "micro": plan.batch.micro,
        "lr": optimizer.lr,
        "betas": optimizer.betas,
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "clip_grad_norm": plan.train.clip_grad_norm,
        "seed": plan.train.seed,
        "steps": plan.train.steps,
        "checkpoint": None,
        **changes,
    }


class Tail:
    """Lines of a JSON file that grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def find(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float) -> dict[str, Any]:
        """The first line from where the last search ended; raises `TimeoutError`."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            for offset, line in iterate_lines(self._path, self._offset):
                self._offset = offset
                if condition(line):
                    found.append(line)
                    return True
            return False

        await_(look, timeout_s, f"{self._path}: the line did not come")
        return found[0]


def await_(condition: Callable[[], Any], timeout_s: float, complaint: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{complaint} ({timeout_s:g} s)")
        time.sleep(0.02)


def children(pid: int) -> dict[int, str]:
    """Pid and name of each living child."""
    return {child: name for child, fields, name in processes() if int(fields[1]) == pid and fields[0] != "Z"}


def descendants(pid: int) -> list[int]:
    """A process and all that came of it."""
    return [pid, *(found for child in children(pid) for found in descendants(child))]


def named(word: str) -> list[int]:
    """Processes with this word in their command line."""
    found = []
    for pid, _, _ in processes():
        with contextlib.suppress(OSError):
            if word in (Path("/proc") / str(pid) / "cmdline").read_text().split("\0"):
                found.append(pid)
    return found


def session_members(session: int) -> list[int]:
    return [pid for pid, fields, _ in processes() if int(fields[3]) == session]


def processes() -> Iterator[tuple[int, list[str], str]]:
    """Of every process its pid, the fields of its `stat` from the state on, and its name (proc(5))."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                head, _, tail = (entry / "stat").read_text().rpartition(")")
                yield int(entry.name), tail.split(), head.partition("(")[2]
