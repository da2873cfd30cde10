"""Plans of the shipped jobs on machines written down here, beside their committed text: a changed default shows.

`make generate` writes them anew; read the difference before you commit it.
"""

from pathlib import Path

from dtrain.machine import Gpu, Machine
from dtrain.planning import make_plan
from dtrain.settings import convert
from dtrain.spec.cluster import ClusterSpec
from dtrain.spec.load import load_job

ROOT = Path(__file__).resolve().parents[2]
MACHINES = {
    "two-cores": Machine(num_cores=2, memory_gib=24.0, cores_compute_bf16=True),
    "eight-h100": Machine(num_cores=192, memory_gib=2048.0, gpus=(Gpu("NVIDIA H100 80GB HBM3", 80.0),) * 8),
}


FOR_GPUS = {"finetune_lora", "gpt2_124m", "gpt_1b_fsdp", "gpt_7b_zero3", "resnet50_imagenet"}
"""Jobs that are planned on the machine with GPUs only."""
FOR_BOTH = {"gpt_small"}
"""All others are planned on the two cores they are written for."""


def cases() -> list[tuple[Path, str]]:
    """Every shipped job on the machines it is for."""
    return [(job, machine) for job in sorted((ROOT / "jobs").glob("*.yaml")) for machine in machines(job.stem)]


def machines(job: str) -> list[str]:
    if job in FOR_BOTH:
        return list(MACHINES)
    return ["eight-h100" if job in FOR_GPUS else "two-cores"]


def golden(job: Path, machine: str) -> Path:
    return Path(__file__).parent / f"{job.stem}.{machine}.json"


def text(job: Path, machine: str) -> str:
    place = convert({"name": "local", "backend": {"name": "local"}, "storage": "/runs"}, ClusterSpec)
    return make_plan(load_job(job), place, MACHINES[machine], Path("/jobs")).to_json() + "\n"


if __name__ == "__main__":
    for stale in set(Path(__file__).parent.glob("*.json")) - {golden(*case) for case in cases()}:
        stale.unlink()
    for job, machine in cases():
        golden(job, machine).write_text(text(job, machine))
    import rendered  # beside this file

    rendered.write()
