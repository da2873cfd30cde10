"""What the machine gives a run: devices, shared memory, ports, limits and folders."""

import contextlib
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path

from dtrain.checkpoint.shared_memory import FOLDER as SHARED_MEMORY
from dtrain.finding import Finding, State
from dtrain.machine import Machine

MIB, GIB = 2**20, 2**30
BYTES_PER_PARAMETER = 12
"""Of a snapshot: the weight and AdamW's two moments, each fp32."""
SMALL_MODEL, MID_MODEL = 10_000_000, 124_000_000
"""Parameters of the smallest job worth running (jobs/gpt_small.yaml has fewer) and of GPT-2 small."""
RAY_PORTS = range(10002, 20000)
"""Where Ray's workers take their ports; nothing else may sit there."""
NUM_PORTS = 8
LONGEST_SOCKET_PATH = 107
"""Of a Unix socket: `sun_path` in unix(7), less its closing zero."""
LONGEST_SOCKET_NAME = len(
    f"/dtrain-{os.getuid()}/01234567/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
)
"""Longest path under the temporary folder that the embedded cluster and Ray make."""
FEWEST_FILES, ENOUGH_FILES = 256, 1024
LITTLE_SPACE = 1 * GIB


def check(machine: Machine) -> list[Finding]:
    """Look at everything here, each with the limits of a real run."""
    return [
        *devices(machine),
        system(),
        shared_memory(),
        loopback(),
        ports(),
        files(),
        temporary_folder(Path(tempfile.gettempdir())),
        folder("home folder", Path("~/.dtrain").expanduser(), "set HOME to a folder of yours"),
        folder("runs folder", Path("runs"), "choose another with --set cluster.storage=FOLDER"),
        compiler(shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")),
    ]


def devices(machine: Machine) -> list[Finding]:
    found = [Finding("processor", "ok", f"{machine.num_cores} cores, {machine.memory_gib:.1f} GiB of memory")]
    if machine.memory_gib < 2:
        text = f"{machine.memory_gib:.1f} GiB of memory; Ray and two workers take 2.4 GiB"
        found.append(Finding("memory", "warning", text, "give this machine or container more memory"))
    if not machine.gpus:
        found.append(Finding("gpus", "ok", "none found (no nvidia-smi, or it lists none); workers compute on cores"))
    for number, gpu in enumerate(machine.gpus):
        found.append(Finding(f"gpu {number}", "ok", f"{gpu.name}, {gpu.memory_gib:.0f} GiB"))
    return found


def system() -> Finding:
    """Linux, and new enough that no process can be mistaken for another, or outlive whom it belongs to."""
    if not sys.platform.startswith("linux"):
        text = f"this is {sys.platform}; ranks are forked and watched with what only Linux has"
        return Finding("system", "problem", text, "train on Linux; on other systems submit to a cluster that runs it")
    try:
        descriptor = os.pidfd_open(os.getpid())
        try:
            signal.pidfd_send_signal(descriptor, 0)
        finally:
            os.close(descriptor)
        for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET):
            end.close()
    except OSError as error:
        text = f"pidfd or SOCK_SEQPACKET is refused ({error.strerror})"
        return Finding(
            "system", "problem", text, "use Linux 5.3 or newer, and a container runtime that lets pidfd pass"
        )
    return Finding("system", "ok", f"Linux {os.uname().release}, pidfd works")


def shared_memory(free: int | None = None) -> Finding:
    """Room for snapshots; `free` is measured when left out."""
    if free is None:
        try:
            found = os.statvfs(SHARED_MEMORY)
        except OSError as error:
            text = f"{SHARED_MEMORY} cannot be used ({error.strerror})"
            return Finding("shared memory", "problem", text, f"mount a tmpfs at {SHARED_MEMORY}")
        free = found.f_bavail * found.f_frsize
        if not os.access(SHARED_MEMORY, os.W_OK | os.X_OK):
            return Finding("shared memory", "problem", f"{SHARED_MEMORY} cannot be written", "make it mode 1777")
    largest = free // BYTES_PER_PARAMETER
    text = f"{free / MIB:,.0f} MiB free in {SHARED_MEMORY}: snapshots of models up to {largest / 1e6:,.0f}M parameters"
    remedy = (
        f"make it at least {MID_MODEL * BYTES_PER_PARAMETER / GIB:.1f} GiB: docker run --shm-size=4g,"
        f" in Kubernetes an emptyDir with medium: Memory at {SHARED_MEMORY},"
        f" else mount -o remount,size=4g {SHARED_MEMORY}"
    )
    if largest < SMALL_MODEL:
        return Finding("shared memory", "problem", text, remedy)
    if largest < MID_MODEL:
        return Finding("shared memory", "warning", f"{text}; GPT-2 small has {MID_MODEL / 1e6:.0f}M", remedy)
    return Finding("shared memory", "ok", text)


def loopback(address: str = "127.0.0.1", timeout_s: float = 5.0) -> Finding:
    """Whether this machine can talk to itself; ranks, stores and the embedded cluster do nothing else."""
    remedy = "bring it up (ip link set lo up), and let no firewall rule stop connections from a machine to itself"
    names = [name for _, name in socket.if_nameindex()]
    if "lo" not in names:
        return Finding("loopback", "problem", f"there is no interface lo (there is: {', '.join(names)})", remedy)
    try:
        with socket.socket() as listener:
            listener.settimeout(timeout_s)
            listener.bind((address, 0))
            listener.listen(1)
            with socket.create_connection(listener.getsockname(), timeout=timeout_s) as client:
                served, _ = listener.accept()
                with served:
                    served.settimeout(timeout_s)
                    client.sendall(b"here")
                    heard = served.recv(4)
    except OSError as error:
        return Finding("loopback", "problem", f"{address}: {error.strerror or error}", remedy)
    if heard != b"here":
        return Finding("loopback", "problem", f"{address}: what was sent did not arrive", remedy)
    return Finding("loopback", "ok", f"connections to {address} work")


def ports(limits: tuple[int, int] | None = None) -> Finding:
    """Free ports outside those that Ray's workers take; `limits` of the system's choice are read when left out."""
    low, high = limits or _local_ports()
    outside = [port for port in range(low, high + 1) if port not in RAY_PORTS]
    away = f"{RAY_PORTS.start}-{RAY_PORTS.stop - 1}"
    widen = "widen the range: sysctl -w net.ipv4.ip_local_port_range='32768 60999'"
    if len(outside) < NUM_PORTS:
        text = f"the system gives out ports {low}-{high}, and Ray's workers take {away}"
        return Finding("ports", "problem", text, widen)
    held: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        for port in outside:
            candidate = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                candidate.bind(("127.0.0.1", port))
                held.append(candidate)
            if len(held) == NUM_PORTS:
                break
    if len(held) < NUM_PORTS:
        text = f"only {len(held)} of the ports {low}-{high} outside {away} are free, and a cluster takes {NUM_PORTS}"
        return Finding("ports", "problem", text, f"end what holds them (ss -ltnp), or {widen}")
    return Finding("ports", "ok", f"{NUM_PORTS} free ports found outside Ray's own ({away})")


def files(limit: int | None = None) -> Finding:
    """How many files a process may hold open; `limit` is asked when left out."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    text = "any number of open files" if soft == resource.RLIM_INFINITY else f"{soft:,} open files a process"
    if soft == resource.RLIM_INFINITY or soft >= ENOUGH_FILES:
        return Finding("open files", "ok", text)
    state: State = "problem" if soft < FEWEST_FILES else "warning"
    remedy = "raise it: ulimit -n 65536, docker run --ulimit nofile=65536, or LimitNOFILE= of the service"
    return Finding("open files", state, f"{text}; Ray alone may need {ENOUGH_FILES}", remedy)


def temporary_folder(path: Path) -> Finding:
    """Writable, and short enough for Unix sockets below it."""
    longest = LONGEST_SOCKET_PATH - LONGEST_SOCKET_NAME
    if len(os.fsencode(path)) > longest:
        text = f"{path} is {len(os.fsencode(path))} bytes long; Unix sockets below it leave {longest}"
        return Finding("temporary folder", "problem", text, "set TMPDIR to a shorter folder, such as /tmp")
    return folder("temporary folder", path, "set TMPDIR to a folder of yours")


def folder(area: str, path: Path, remedy: str) -> Finding:
    """Whether `path`, or the nearest folder above it that exists, can be written, locked and has room."""
    path = path.absolute()
    existing = next((place for place in (path, *path.parents) if place.exists()), path)
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".dtrain-doctor-") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
        room = os.statvfs(existing)
    except OSError as error:
        reason = "is not a folder" if not existing.is_dir() else f"cannot be written ({error.strerror})"
        return Finding(area, "problem", f"{existing} {reason}", remedy)
    free = room.f_bavail * room.f_frsize
    text = f"{path} can be {'written' if path.exists() else 'made'}, {free / GIB:.1f} GiB free"
    if free < LITTLE_SPACE:
        return Finding(area, "warning", text, f"make room, or {remedy}")
    return Finding(area, "ok", text)


def compiler(found: str | None) -> Finding:
    if found:
        return Finding("compiler", "ok", f"{found} (for train.compile)")
    return Finding("compiler", "ok", "no C compiler; only train.compile needs one")


def _local_ports() -> tuple[int, int]:
    try:
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        return int(low), int(high)
    except (OSError, ValueError):
        return 32768, 60999
