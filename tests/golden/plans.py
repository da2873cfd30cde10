"""Plans of the shipped jobs on machines written down here, beside their committed text: a changed default shows.

`make generate` writes them anew; read the difference before you commit it.
"""

from pathlib import Path

from dtrain.machine import Gpu, Machine
from dtrain.plan import make_plan
from dtrain.spec.cluster import ClusterSpec
from dtrain.spec.load import load_job

ROOT = Path(__file__).resolve().parents[2]
MACHINES = {
    "two-cores": Machine(num_cores=2, memory_gib=24.0, cores_compute_bf16=True),
    "eight-h100": Machine(num_cores=192, memory_gib=2048.0, gpus=(Gpu("NVIDIA H100 80GB HBM3", 80.0),) * 8),
}


def cases() -> list[tuple[Path, str]]:
    """Every shipped job on every machine here."""
    return [(job, machine) for job in sorted((ROOT / "jobs").glob("*.yaml")) for machine in MACHINES]


def golden(job: Path, machine: str) -> Path:
    return Path(__file__).parent / f"{job.stem}.{machine}.json"


def text(job: Path, machine: str) -> str:
    place = ClusterSpec.model_validate({"name": "local", "backend": {"name": "local"}, "storage": "/runs"})
    return make_plan(load_job(job), place, MACHINES[machine]).to_json() + "\n"


if __name__ == "__main__":
    for job, machine in cases():
        golden(job, machine).write_text(text(job, machine))
