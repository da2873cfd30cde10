"""The embedded cluster: a Ray head on this machine, started on first use and kept warm."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from dtrain import fingerprint
from dtrain.backends import DRIVER, Submission
from dtrain.errors import ClusterError
from dtrain.machine import probe
from dtrain.settings import Settings
from dtrain.storage import is_remote

if TYPE_CHECKING:
    from dtrain.plan import AnyPlan

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 60.0
DRAIN_S = 60.0
"""How long runs get to write a last checkpoint when the cluster is taken down."""
HANDED_OVER_S = 2.0
HEAD_NICENESS = 5
"""Training goes before Ray's own processes, and so does the zygote while both start."""


class Options(Settings):
    """A Ray head on this machine, bound to loopback, started on first use and kept warm."""

    home: Annotated[str, Meta(min_length=1, max_length=1024)] = "~/.dtrain"
    """Folder that holds what belongs to the embedded cluster: its record, token and logs."""

    def check_storage(self, storage: str) -> None:
        """Raises `ValueError` for a bucket."""
        if is_remote(storage):
            raise ValueError(
                f"{storage} is a bucket, and the cluster on this machine keeps runs in a folder: name one,"
                " or a cluster that keeps runs in buckets (ray_jobs, kuberay)"
            )


Say = Callable[[str], None]
_detached: list["subprocess.Popen[bytes]"] = []
"""Processes that this one started and that may outlive it: kept, since Python complains of those it forgets."""


def render(plan: "AnyPlan", run_path: Path) -> Submission:
    """The driver's command, without the address of the head: that is this machine's own affair."""
    return Submission(
        backend="local",
        entrypoint=(sys.executable, "-m", DRIVER, "--run", str(run_path)),
        run_path=str(run_path),
        resources=plan.workers.resources,
        num_nodes=plan.workers.num_nodes,
    )


def send(submission: Submission, options: Options, say: Say) -> None:
    """Give the run to a waiting driver, or start one; start the head first where there is none.

    Raises `ClusterError` when Ray is not installed, or its head does not start.
    """
    if submission.num_nodes > 1:
        raise ClusterError("the embedded cluster is one machine; for several nodes name another cluster with --cluster")
    home = _Home(options)
    log = Path(submission.run_path) / "logs" / "driver.log"
    with home.locked(), contextlib.ExitStack() as stack:
        record = home.record()
        turn = None
        if record is None:
            say("starting a Ray head on this machine (kept warm for the next run)")
            record = home.start_head()
            # Which GPUs are a run's only Ray can tell: such a run waits for it.
            if submission.resources.get("CPU", 0) <= record["cores"] and not submission.resources.get("GPU"):
                turn = stack.enter_context(home.turn(record))
        elif home.hand_over(submission.run_path):
            return
        # The driver connects while the head may still be coming up: both take seconds, so they take them together.
        home.start_driver([*submission.entrypoint], record, log, turn)


def cluster_up(options: Options, say: Say) -> dict[str, Any]:
    """Start the head unless it runs; returns its status."""
    home = _Home(options)
    with home.locked():
        record = home.record()
        if record is None:
            say("starting a Ray head on this machine")
            record = home.start_head()
            home.start_driver([sys.executable, "-m", DRIVER, "--wait"], record, home.folder / "drivers.log")
    home.await_ready(say)
    return cluster_status(options)


def cluster_status(options: Options) -> dict[str, Any]:
    """What is known of the embedded cluster: address, dashboard, processes, runs under way."""
    home = _Home(options)
    record = home.record()
    if record is None:
        return {"state": "down", "home": str(home.path)}
    return {
        "state": "up",
        "home": str(home.path),
        "address": record["address"],
        "dashboard": f"http://{LOOPBACK}:{record['dashboard_port']}",
        "token": str(home.token),
        "pid": record["pid"],
        "started_at": record["started_at"],
        "cores": record["cores"],
        "gpus": record["gpus"],
        "waiting_drivers": len(list(home.folder.glob("driver-*.sock"))),
        "runs": sorted(Path(path).name for path in home.drivers().values()),
    }


def cluster_down(options: Options) -> list[str]:
    """Let runs write a last checkpoint, then end the head and everything it started; returns a line for each."""
    home = _Home(options)
    ended = []
    with home.locked():
        record = home.record()
        for pid, path in home.drivers().items():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
                ended.append(f"stopped run {Path(path).name}")
        deadline = time.monotonic() + DRAIN_S
        while home.drivers() and time.monotonic() < deadline:
            time.sleep(0.1)
        if record is not None:
            _end_session(record["pid"])
            ended.append(f"ended the Ray head (pid {record['pid']})")
        home.forget()
        if record is not None:
            _await_zygote(home.folder)
    return ended


class _Home:
    """The embedded cluster's folders: the record in `home`, sockets and Ray's files under a short temporary path."""

    def __init__(self, options: Options) -> None:
        self.path = Path(options.home).expanduser().resolve()
        self.token = self.path / "token"
        key = hashlib.sha256(str(self.path).encode()).hexdigest()[:8]
        # Unix socket paths are at most 107 bytes long, and Ray's own names take most of them.
        self.folder = Path(tempfile.gettempdir()) / f"dtrain-{os.getuid()}" / key

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder.parent, self.folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.stat().st_uid != os.getuid():
                raise ClusterError(f"{folder} belongs to somebody else; remove it, or set TMPDIR to a folder of yours")
        with open(self.path / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def record(self) -> dict[str, Any] | None:
        """The record of a head that is alive; what a dead one left is cleared away."""
        try:
            record = dict(json.loads((self.path / "cluster.json").read_text()))
        except (OSError, ValueError):
            return None
        if _started_at(record["pid"]) == record["pid_started"]:
            return record
        return None

    def start_head(self) -> dict[str, Any]:
        """Start a Ray head in a session of its own. Returns at once: it is ready some seconds later."""
        self.forget()
        ray = Path(sys.executable).parent / "ray"
        if not ray.is_file():
            raise ClusterError("Ray is not installed beside this Python; run: pip install 'dtrain[train]'")
        machine = probe()
        if not self.token.exists():
            descriptor = os.open(self.token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(descriptor, secrets.token_hex(32).encode())
            os.close(descriptor)
        port, dashboard_port, client_port, agent_port, agent_grpc, metrics_port, env_port = _free_ports(7)
        command = [
            str(ray), "start", "--head", "--block", "--disable-usage-stats",
            f"--node-ip-address={LOOPBACK}", f"--port={port}",
            f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard_port}",
            f"--ray-client-server-port={client_port}", f"--dashboard-agent-listen-port={agent_port}",
            f"--dashboard-agent-grpc-port={agent_grpc}", f"--metrics-export-port={metrics_port}",
            f"--runtime-env-agent-port={env_port}",
            f"--num-cpus={machine.num_cores}", f"--num-gpus={len(machine.gpus)}",
            f"--temp-dir={self.folder / 'ray'}",
            "--no-monitor", "--include-log-monitor=false",  # nothing is scaled, and no log is sent to drivers
        ]  # fmt: skip
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps Ray on loopback
            # The first run waits for the raylet, and should not for what it does not use: Ray starts the raylet after
            # the dashboard has answered or this time is over, and with the first driver as many workers as cores.
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "0",
            "RAY_prestart_worker_first_driver": "0",
        }
        with open(self.folder / "head.log", "wb") as log:
            head = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                preexec_fn=lambda: os.nice(HEAD_NICENESS),
            )
        _detached.append(head)
        record = {
            "pid": head.pid,
            "pid_started": _started_at(head.pid),
            "address": f"{LOOPBACK}:{port}",
            "dashboard_port": dashboard_port,
            "started_at": time.time(),
            "cores": machine.num_cores,
            "gpus": len(machine.gpus),
        }
        (self.path / "cluster.json").write_text(json.dumps(record, indent=2))
        return record

    @contextlib.contextmanager
    def turn(self, record: dict[str, Any]) -> Iterator[int]:
        """The lock that a driver takes before it reserves, for the first one: it need not wait for Ray to begin."""
        descriptor = os.open(self.folder / f"turn-{record['pid']}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor  # the driver inherits it, and with it the lock
        finally:
            os.close(descriptor)

    def start_driver(self, command: list[str], record: dict[str, Any], log_path: Path, turn: int | None = None) -> None:
        """Start a driver, in a session of its own, that leaves a waiting one behind when its run is over."""
        words = ["--address", record["address"], "--token", str(self.token), "--folder", str(self.folder)]
        words += ["--until", str(record["pid"]), "--spare"]
        words += [] if turn is None else ["--turn", str(turn)]
        with open(log_path, "ab") as log:
            driver = subprocess.Popen(
                [*command, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[] if turn is None else [turn],
            )
        _detached[:] = [driver, *(process for process in _detached if process.poll() is None)]

    def hand_over(self, run_path: str) -> bool:
        """Give the run to a waiting driver of this very code; False when there is none."""
        mine = f"driver-{fingerprint.of_code()}-"
        for path in sorted(self.folder.glob("driver-*.sock")):
            word = run_path if path.name.startswith(mine) else "leave"
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                connection.settimeout(HANDED_OVER_S)
                try:
                    connection.connect(str(path))
                    connection.send(word.encode())
                    if word != "leave" and connection.recv(16) == b"taken":
                        return True
                except OSError:
                    path.unlink(missing_ok=True)
        return False

    def await_ready(self, say: Say) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not list(self.folder.glob("driver-*.sock")):
            if self.record() is None:
                raise ClusterError(f"the Ray head ended while starting; see {self.folder / 'head.log'}")
            if time.monotonic() > deadline:
                say(f"the cluster is slow to come up; its logs are in {self.folder}")
                return
            time.sleep(0.05)

    def drivers(self) -> dict[int, str]:
        """Pid and run folder of each driver that is alive."""
        found = {}
        for path in (self.folder / "drivers").glob("*"):
            try:
                os.kill(int(path.name), 0)
                found[int(path.name)] = path.read_text()
            except ProcessLookupError:
                path.unlink(missing_ok=True)
            except (OSError, ValueError):
                continue
        return found

    def forget(self) -> None:
        (self.path / "cluster.json").unlink(missing_ok=True)
        for name in ("ray", "drivers"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for path in (*self.folder.glob("*.sock"), *self.folder.glob("turn-*")):
            path.unlink(missing_ok=True)


def _started_at(pid: int) -> str:
    """Start time of a process in clock ticks, so that a reused pid is not taken for it; empty when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _end_session(session: int) -> None:
    """End every process of the head's session: workers have process groups of their own, but the session is one."""
    for signum, patience_s in ((signal.SIGTERM, 0.2), (signal.SIGKILL, 5.0)):
        members = _session_members(session)
        # The head's parent goes first: it would report the others as crashed.
        for pid in sorted(members, key=lambda p: p != session):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if pid == session else signum)
        deadline = time.monotonic() + patience_s
        while _session_members(session) and time.monotonic() < deadline:
            time.sleep(0.02)


def _session_members(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    found.append(int(entry.name))
    return found


def _await_zygote(folder: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        pid = int((folder / "zygote.pid").read_text())
        deadline = time.monotonic() + 10.0
        while _started_at(pid) and time.monotonic() < deadline:
            time.sleep(0.02)


def _free_ports(count: int) -> list[int]:
    """Free ports outside the range from which Ray's workers take theirs (10002-19999).

    The system chooses; where it chooses from that range alone, others are tried one by one. Raises `ClusterError` when
    there are not enough.
    """
    held: list[socket.socket] = []
    ports: list[int] = []
    for candidate in itertools.chain(itertools.repeat(0, 8 * count), range(20_000, 65_536)):
        if len(ports) == count:
            break
        probe_socket = socket.socket()
        try:
            probe_socket.bind((LOOPBACK, candidate))
        except OSError:
            probe_socket.close()
            continue
        held.append(probe_socket)
        port = probe_socket.getsockname()[1]
        if not 10000 <= port <= 19999:
            ports.append(port)
    for probe_socket in held:
        probe_socket.close()
    if len(ports) < count:
        raise ClusterError(f"only {len(ports)} of {count} ports are free on {LOOPBACK}; end what holds the others")
    return ports
