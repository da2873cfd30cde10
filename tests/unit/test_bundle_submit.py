"""A submit to a cluster elsewhere sends the user's own code; what cannot be sent is refused before there is a run."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from bundling import TASK, write

from dtrain import api, code, runs
from dtrain.errors import InputError
from dtrain.plan import Plan


def a_job_of_ones_own(folder: Path) -> Path:
    job: dict[str, Any] = {"name": "mine", "model": "./task.py:build", "data": {"name": "images", "source": "digits"}}
    job |= {"batch": {"global": 8}, "optimizer": {"name": "adamw", "lr": 1e-3}, "train": {"steps": 10}}
    write(folder, {"job.yaml": json.dumps(job), "task.py": TASK})
    return folder / "job.yaml"


def elsewhere(storage: Path) -> dict[str, Any]:
    """A Ray cluster at whose address nobody answers."""
    backend = {"name": "ray_jobs", "address": "http://127.0.0.1:9"}
    return {"name": "away", "backend": backend, "device": "cpu", "workers_per_node": 2, "storage": str(storage)}


def created(job: Path, cluster: dict[str, Any], said: list[str]) -> tuple[runs.Run, Plan]:
    return api.create(api.decide(job, cluster), job.read_text(), said.append, job.parent)


def test_a_shared_folder_gets_the_code_and_a_plan_that_names_it_there(tmp_path: Path) -> None:
    job, said = a_job_of_ones_own(tmp_path / "client"), list[str]()
    run, plan = created(job, elsewhere(tmp_path / "storage"), said)
    assert said == [f"sending 2 files of {job.parent} ({job.stat().st_size + len(TASK)} B)"]
    assert run.plan == plan
    assert plan.model.build.startswith(f"{tmp_path}/storage/code/")
    assert code.changed(plan.code) == []
    assert (run.path / "code.json").is_file()
    assert [found.id for found in runs.list_runs(tmp_path / "storage")] == [run.id]


def test_code_that_cannot_be_sent_is_refused_before_there_is_a_run(tmp_path: Path) -> None:
    job = a_job_of_ones_own(tmp_path / "client")
    os.mkfifo(job.parent / "pipe")
    with pytest.raises(InputError, match="pipe is a pipe"):
        created(job, elsewhere(tmp_path / "storage"), [])
    assert not (tmp_path / "storage").exists()


def test_this_machine_needs_nothing_sent(tmp_path: Path) -> None:
    job = a_job_of_ones_own(tmp_path / "client")
    os.mkfifo(job.parent / "pipe")
    here = {"name": "here", "backend": {"name": "local"}, "storage": str(tmp_path / "storage")}
    run, plan = created(job, here, [])
    assert plan.model.build == f"{job.parent}/task.py:build"
    assert not (run.path / "code.json").exists()
    assert not (tmp_path / "storage" / "code").exists()
