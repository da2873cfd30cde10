"""What `dtrain init` writes is what runs."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from making import TWO_CORES, a_cluster

from dtrain import starting
from dtrain.cli import cli
from dtrain.data import custom
from dtrain.errors import InputError
from dtrain.models import Request, Task
from dtrain.models import custom as model
from dtrain.planning import make_plan
from dtrain.spec.load import load_job


@pytest.fixture(autouse=True)
def nothing_stays_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("task", "data"):
        sys.modules.pop(name, None)


class Bytes:
    """As much of a source of text as a sample needs."""

    separator = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode("latin-1")


def loss_of(task: Task, batch: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return task.finish_evaluation({k: float(v) for k, v in task.evaluate(task.parts, batch).items()})["loss"]


@pytest.mark.parametrize("name", starting.MODELS)
def test_a_task_to_begin_from_learns(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    starting.write(starting.files(name, folder))
    plan = make_plan(load_job(folder / "job.yaml"), a_cluster(), TWO_CORES, folder)
    shape = custom.describe(plan.data) if plan.data.name == "custom" else None
    if shape is not None:
        source = custom.open(plan.data, tmp_path)
        indices = np.arange(32)
        arrays = {**source.train.batch(indices, indices.astype(np.uint64)), "draws": indices}
        batch = {key: torch.from_numpy(array) for key, array in arrays.items()}
    else:
        from dtrain.data import text

        source, shape = Bytes(), text.describe(plan.data)
        tokens = torch.arange(shape.sequence_length + 1).repeat(32, 1) % 50
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "draws": torch.arange(32)}
    task = model.build(plan.model, shape, plan.train)
    optimizers = {
        phase.name: torch.optim.Adam([p for part in phase.parts for p in task.parts[part].parameters()], lr=3e-3)
        for phase in task.phases
    }
    before = loss_of(task, batch)
    for _ in range(20):
        for phase in task.phases:
            optimizers[phase.name].zero_grad()
            task.loss(phase.name, task.parts, batch).backward()
            optimizers[phase.name].step()
    assert loss_of(task, batch) < before
    made = task.sample(source, Request(length=5, count=4))
    if name in ("gan", "autoencoder"):
        assert made.pictures.shape == (4, 8, 8, 1)
        assert made.pictures.dtype == np.uint8
    elif name in ("rnn", "transformer"):
        assert len(made.text) >= 4
    else:
        assert made is None
        return
    # Weights on a GPU, for which torch's `meta` device stands: it computes all of it, and has nothing to give back.
    for part in task.parts.values():
        part.to("meta")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        task.sample(source, Request(length=5, count=4))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("mine")
    with pytest.raises(InputError, match=r"task\.py is there already, and nothing is overwritten; name another folder"):
        starting.files("cnn", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["task.py"]


def test_the_command_says_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["init", "here", "--model", "gan"])
    assert done.exit_code == 0
    assert done.stdout.split() == ["here/job.yaml", "here/task.py", "here/data.py"]
    assert "`dtrain submit here/job.yaml` trains it" in done.stderr
    option = next(p for p in cli.commands["init"].params if p.name == "model")
    assert tuple(option.type.choices) == starting.MODELS


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"job\.yaml cannot be written: .*; name another folder"):
        starting.write(starting.files("mlp", tmp_path / "file"))
