"""Projects of a user's own, and their plans."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from making import TWO_CORES, a_cluster

from dtrain import bundle
from dtrain.plan import AnyPlan, Plan, ScriptPlan
from dtrain.planning import make_plan
from dtrain.settings import convert
from dtrain.spec.job import JobSpec, ScriptSpec
from dtrain.storage import Storage

TASK = "def build(data, train, **options):\n    return 'the task'\n"


def write(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, contents in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return root


def git(root: Path, *words: str) -> None:
    who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    plain = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    subprocess.run(["git", "-C", str(root), *who, *words], check=True, capture_output=True, env=plain)


def repository(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """A repository in which these files are committed."""
    root.mkdir(parents=True, exist_ok=True)
    git(root, "init", "-q")
    write(root, files)
    git(root, "add", "-A", "-f")
    git(root, "commit", "-q", "-m", "Begin")
    return root


def a_plan_of(folder: Path, model: Any = "./task.py:build", data: Any = None) -> Plan:
    """The plan of a job file in `folder` that names a task of the user's own."""
    asked = {
        "name": "mine",
        "model": {"name": "custom", "build": model} if isinstance(model, str) else model,
        "data": data or {"name": "images", "source": "digits"},
        "batch": {"global": 8},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "train": {"steps": 10},
    }
    return make_plan(convert(asked, JobSpec), a_cluster(), TWO_CORES, folder)


def a_script_plan(folder: Path, **entrypoint: Any) -> ScriptPlan:
    """The plan of a job file in `folder` that names a script."""
    job = convert({"name": "mine", "entrypoint": {"script": "train.py", **entrypoint}}, ScriptSpec)
    return make_plan(job, a_cluster(), TWO_CORES, folder)


def ship(storage: Storage, run_id: str, plan: AnyPlan, folder: Path | None = None, **more: Any) -> bundle.Bundle | None:
    """All that a client does for a run's code."""
    sent = bundle.send(storage, plan, folder, **more)
    if sent is not None:
        bundle.record(storage, run_id, sent)
    return sent
