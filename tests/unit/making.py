"""Small jobs, plans and run folders for tests."""

from pathlib import Path
from typing import Any

from dtrain import runs
from dtrain.machine import Gpu, Machine
from dtrain.plan import Plan
from dtrain.planning import make_plan
from dtrain.settings import convert
from dtrain.spec.cluster import ClusterSpec
from dtrain.spec.job import JobSpec

TWO_CORES = Machine(num_cores=2, memory_gib=8.0)
FOUR_GPUS = Machine(num_cores=16, memory_gib=64.0, gpus=(Gpu("H200", 141.0),) * 4)


def a_job(**changes: Any) -> JobSpec:
    """A small job; `changes` are sections of the file, merged into those that are there."""
    asked: dict[str, Any] = {
        "name": "tiny",
        "model": {"name": "transformer", "num_layers": 2, "num_heads": 2, "width": 32},
        "data": {"name": "text"},
        "batch": {"global": 8},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "train": {"steps": 100},
    }
    for key, value in changes.items():
        asked[key] = {**asked[key], **value} if isinstance(value, dict) and key in asked else value
    return convert(asked, JobSpec)


def a_cluster(**changes: Any) -> ClusterSpec:
    return convert({"name": "local", "backend": {"name": "local"}, **changes}, ClusterSpec)


def a_plan(storage: Path | str = "runs", machine: Machine = TWO_CORES, **changes: Any) -> Plan:
    return make_plan(a_job(**changes), a_cluster(storage=str(storage)), machine)


def a_run(storage: Path | str, **record: Any) -> runs.Run:
    """A new run folder, its record changed by `record`."""
    run = runs.create(a_plan(storage), "name: tiny\n")
    if record:
        run.update(**record)
    return run
