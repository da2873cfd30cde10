"""Imports point down, and what only asks, decides or submits loads neither torch nor ray."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "numpy", "accelerate", "deepspeed", "kubernetes", "pydantic")

PLAN_EVERYTHING = """
from pathlib import Path
from dtrain.planning import make_plan
from dtrain.spec.load import load_cluster, load_job
for path in Path("jobs").glob("*.yaml"):
    make_plan(load_job(path), load_cluster("clusters/eight_gpus.yaml"))
"""


def test_layers_point_down():
    command = [
        sys.executable,
        "-c",
        "import sys; from importlinter.cli import lint_imports_command as c; sys.exit(c())",
    ]
    result = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import dtrain.cli", (*HEAVY, "rich", "msgspec", "yaml")),
        ("import dtrain.spec.load, dtrain.spec.schema", HEAVY),
        ("import dtrain.plan, dtrain.runs", HEAVY),
        ("from dtrain.backends import local", HEAVY),
        (PLAN_EVERYTHING, HEAVY),
    ],
    ids=["cli", "spec", "plan", "backends", "planning"],
)
def test_asking_and_deciding_stay_light(statement, forbidden):
    code = f"{statement}\nimport sys\nprint(*(m for m in {forbidden!r} if m in sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stdout + result.stderr
