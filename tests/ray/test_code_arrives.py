"""A user's own code runs on a cluster that cannot see the folder it was submitted from."""

import json
from pathlib import Path

import pytest
from test_remote import Away, away  # noqa: F401 -- a fixture

from dtrain import runs

TASK = """
import torch
from helping.widths import WIDTH

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, 1))

    def loss(self, batch):
        return torch.nn.functional.mse_loss(self.layers(batch["inputs"])[:, 0], batch["targets"])

def build(data, train):
    return Net()
"""
DATA = """
from pathlib import Path
import numpy as np

def open_data():
    rows = np.loadtxt(Path(__file__).parent / "rows.csv", delimiter=",", dtype=np.float32)
    arrays = {"inputs": rows[:, :2], "targets": rows[:, 2]}
    return arrays, arrays
"""
SCRIPT = """
import os
import sys
from pathlib import Path
import dtrain
from helping.widths import WIDTH

dtrain.current_run().report(step=1, loss=WIDTH, read=float(Path("settings.txt").read_text()))
print("in", os.getcwd(), "with", sys.argv[1:])
"""


def project(folder: Path, job: dict[str, object]) -> Path:
    files = {"task.py": TASK, "my_data.py": DATA, "train.py": SCRIPT, "helping/widths.py": "WIDTH = 8\n"}
    files |= {"job.yaml": json.dumps(job), "settings.txt": "3.5"}
    files |= {"rows.csv": "\n".join(f"{n % 7},{n % 5},{(n % 7) / 7 + (n % 5) / 5}" for n in range(64))}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "job.yaml"


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_a_task_through_a_bucket_and_a_script_through_a_shared_folder(
    away: Away,  # noqa: F811
    tmp_path: Path,
) -> None:
    learning = {"batch": {"global": 16}, "optimizer": {"name": "adamw", "lr": 1e-2}, "train": {"steps": 20}}
    own = {"model": "./task.py:build", "data": "./my_data.py:open_data"}
    task = project(tmp_path / "a", {"name": "task", **own, **learning})
    first = submitted(away, task)
    of_task = runs.find(away.place, first)
    away.until(of_task, lambda record: record.ended)
    assert of_task.stored_record().state == "succeeded", away.story(of_task)
    assert of_task.stored_record().outcome["steps"] == 20

    shared = tmp_path / "shared"
    entrypoint = {"script": "train.py", "args": ["--x", str(tmp_path)]}
    script = project(tmp_path / "b", {"name": "script", "entrypoint": entrypoint})
    second = submitted(away, script, f"--set=cluster.storage={shared}")
    of_script = runs.find(str(shared), second)
    away.until(of_script, lambda record: record.ended)
    assert of_script.stored_record().state == "succeeded", away.story(of_script)
    assert of_script.metrics()[0] | {"loss": 8, "read": 3.5} == of_script.metrics()[0]
    printed = (of_script.logs / "rank-0.log").read_text()
    assert f"in {shared}/code/" in printed
    assert f"with ['--x', '{tmp_path}']" in printed


def submitted(away: Away, job: Path, *words: str) -> str:  # noqa: F811
    """The name of a run whose client's folder is gone before it begins."""
    name = away.dtrain("submit", str(job), "-d", "--set=cluster.workers_per_node=1", *words).stdout.strip()
    job.parent.rename(job.parent.with_name(f"gone-{job.parent.name}"))
    return name
