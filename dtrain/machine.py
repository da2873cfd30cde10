"""What a machine has to compute with: this one, found without torch or ray, or one that a cluster file describes."""

import os
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from dtrain.settings import PositiveInt, Settings


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_gib: float
    computes_bf16: bool = True
    """Compute capability 8.0 (Ampere) and newer."""


@dataclass(frozen=True)
class Machine:
    num_cores: int
    """Cores this process may use (its CPU affinity and cgroup quota counted)."""
    memory_gib: float
    """Main memory this process may use."""
    gpus: tuple[Gpu, ...] = ()
    cores_compute_bf16: bool = False
    """Whether the processor has bf16 dot products; without them bf16 is emulated, many times slower than fp32."""


class MachineSpec(Settings):
    """What each node of a cluster has for a run; planning reads it here and never looks at the machine it runs on."""

    cores: Annotated[PositiveInt, Meta(le=4096)]
    """Cores that a run may have on each node: all of them, less what the system and its own pods take."""
    memory_gib: Annotated[float, Meta(gt=0, le=100_000)]
    """Main memory that a run may have on each node, in GiB."""
    gpus: Annotated[int, Meta(ge=0, le=64)] = 0
    """GPUs of each node."""
    gpu: Annotated[str, Meta(max_length=100)] = ""
    """What GPUs they are, for people to read."""
    gpu_memory_gib: Annotated[float, Meta(gt=0, le=10_000)] | None = None
    """Memory of one GPU in GiB; to be given where there are GPUs."""
    bf16: bool | None = None
    """Whether what computes there does so in bf16; GPUs do and cores do not unless told otherwise."""

    def __post_init__(self) -> None:
        if self.gpus and self.gpu_memory_gib is None:
            raise ValueError(f"{self.gpus} GPUs, and gpu_memory_gib does not say how much memory one of them has")

    def machine(self) -> Machine:
        """The same, as planning takes it."""
        gpu = Gpu(self.gpu or "GPU", self.gpu_memory_gib or 0.0, computes_bf16=self.bf16 is not False)
        return Machine(
            num_cores=self.cores,
            memory_gib=self.memory_gib,
            gpus=(gpu,) * self.gpus,
            cores_compute_bf16=self.bf16 is True and not self.gpus,
        )


def probe() -> Machine:
    """Look at the machine this runs on."""
    return Machine(num_cores=_cores(), memory_gib=_memory_gib(), gpus=_gpus(), cores_compute_bf16=_cores_compute_bf16())


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def _cores_compute_bf16() -> bool:
    flags = _read("/proc/cpuinfo")
    return "amx_bf16" in flags or "avx512_bf16" in flags


def _memory_gib() -> float:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        total = min(total, int(limit))
    return total / 2**30


def _gpus() -> tuple[Gpu, ...]:
    import shutil
    import subprocess

    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    query = [command, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[word.strip() for word in line.rsplit(",", 2)] for line in lines if line.count(",") >= 2]
    return tuple(
        Gpu(name, float(mib) / 1024, capability.partition(".")[0] not in ("3", "5", "6", "7"))
        for name, mib, capability in rows
        if mib.replace(".", "").isdigit()
    )


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""
