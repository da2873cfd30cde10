"""What would be sent for a few of the shipped jobs, beside its committed text: a changed default shows.

`make generate` writes them anew; read the difference before you commit it.
"""

from pathlib import Path

from dtrain.backends import kuberay
from dtrain.planning import make_plan
from dtrain.spec.load import load_cluster, load_job

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent / "rendered"
PAIRS = (("gpt_small", "kind"), ("gpt_7b_zero3", "gke_h100"), ("gpt_1b_fsdp", "aks_nd_h100"))


def golden(job: str, cluster: str) -> Path:
    return FOLDER / f"{job}.{cluster}.yaml"


def text(job: str, cluster: str) -> str:
    place = load_cluster(ROOT / "clusters" / f"{cluster}.yaml")
    plan = make_plan(load_job(ROOT / "jobs" / f"{job}.yaml"), place, folder=Path("/jobs"))
    return kuberay.render(plan, Path(f"{job}-k3f9")).text() + "\n"


def write() -> None:
    for stale in set(FOLDER.glob("*.yaml")) - {golden(*pair) for pair in PAIRS}:
        stale.unlink()
    for pair in PAIRS:
        golden(*pair).write_text(text(*pair))


if __name__ == "__main__":
    write()
