"""A user's own code: read while planning, run on workers, wrong in ways that are said clearly."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from making import TWO_CORES, a_cluster
from msgspec.structs import replace
from torch import nn

import dtrain
from dtrain import code
from dtrain.data import DataShape, custom
from dtrain.errors import InputError, TrainingError
from dtrain.models import custom as model
from dtrain.plan import Plan, ScriptPlan, read_plan
from dtrain.planning import make_plan
from dtrain.runtime.rank import text_of
from dtrain.spec.job import Train
from dtrain.spec.load import load_job, located
from dtrain.view.plan import show

JOB = """\
name: mine
model: {model}
data: {data}
batch: {{global: 8}}
optimizer: {{name: adamw, lr: 1e-3}}
train: {{steps: 10}}
"""
TASK = """
import torch
import dtrain

class Mine(dtrain.Task):
    def loss(self, phase, parts, batch):
        return parts["model"](batch["inputs"]).square().mean()

def build(data, train, width=4, *, depth=1):
    return Mine({"model": torch.nn.Linear(3, width)})

def open_data(held_out=0.5):
    return {"inputs": torch.ones(8, 3)}, {"inputs": torch.ones(4, 3)}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "job.yaml").write_text(JOB.format(model="./task.py:build", data="./task.py:open_data"))
    return tmp_path


@pytest.fixture(autouse=True)
def nothing_stays_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if not name.startswith(("dtrain", "torch")):
            del sys.modules[name]


def plan(folder: Path, *overrides: str) -> Plan:
    path = folder / "job.yaml"
    with located(path, overrides):
        return make_plan(load_job(path, overrides), a_cluster(), TWO_CORES, folder)


# -- planning ----------------------------------------------------------------------------------------------------


def test_a_short_form_is_the_long_one(folder: Path) -> None:
    short = plan(folder)
    assert short.model.build == f"{folder}/task.py:build"
    assert short.data.open == f"{folder}/task.py:open_data"
    long = {"model": "{name: custom, build: task.py:build}", "data": "{name: custom, open: task.py:open_data}"}
    (folder / "job.yaml").write_text(JOB.format(**long))
    assert plan(folder) == short
    assert read_plan(short.to_json().encode(), "plan.json") == short
    assert plan(folder, "model=./task.py:build", "model.options.width=7").model.options == {"width": 7}


def test_the_plan_holds_the_code_s_hash(folder: Path) -> None:
    made = plan(folder)
    path = str(folder / "task.py")
    assert list(made.code) == [path]
    assert code.changed(made.code) == []
    Path(path).write_text(TASK + "\n")
    assert code.changed(made.code) == [path]
    assert plan(folder).code != made.code


def test_what_is_not_known_is_said(folder: Path) -> None:
    from rich.console import Console

    made = plan(folder)
    assert made.arithmetic.num_parameters == 0
    assert made.batch.micro == 4, "a worker's whole share"
    out = Console(width=200)
    with out.capture() as said:
        out.print(show(made))
    assert "parameters counted when the workers build it" in said.get()
    assert "0 FLOP" not in said.get()


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ("", ["model=./tsk.py:build"], "--set model=./tsk.py:build: model.build: there is no file {folder}/tsk.py"),
        ("", ["model=./task.py:biuld"], "{folder}/task.py has no 'biuld' at its top level; did you mean 'build'?"),
        ("def build(:\n", [], "job.yaml:3: data.open: {folder}/task.py:14: invalid syntax"),
        ("", ["model.options.widht=3"], "task.py:9: build takes no option 'widht'; did you mean 'width'?"),
        ("def build(data): ...", [], "build takes 1 arguments by position; it is called with (data, train, **options)"),
        ("def build(data, train, size): ...", [], "build needs the option 'size'"),
        ("def build(data, train, *, size): ...", [], "build needs the option 'size'"),
        ("", ["model=no_such.module:build"], "there is no module no_such in {folder}"),
        ("", ["model=task.nothing:build"], "there is no module task.nothing in"),
        (
            "",
            ["model=task:build.x"],
            "model.build: expected FILE.py:FUNCTION, or MODULE:FUNCTION, found 'task:build.x'",
        ),
        ("", ["data.options.x=3"], "data.open: {folder}/task.py:12: open_data takes no option 'x'"),
        ("", ["model=cnnn"], "write {{name: cnn}}"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(folder: Path, change: str, settings: list[str], message: str) -> None:
    (folder / "task.py").write_text(TASK + change)
    with pytest.raises(InputError) as error:
        plan(folder, *settings)
    assert message.format(folder=folder) in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        "build = make_builder()",
        "from elsewhere import build",
        "try:\n    from a import build\nexcept ImportError:\n    from b import build",
        "class build:\n    pass",
        "from elsewhere import *",
        "def build(*args, **kwargs): ...",
        "@decorated\ndef build(): ...",
        "if True:\n    def build(data, train): ...",
    ],
)
def test_what_cannot_be_seen_is_not_refused(folder: Path, change: str) -> None:
    (folder / "task.py").write_text(change + "\ndef open_data(): ...\n")
    assert plan(folder).model.build.endswith(":build")


def test_planning_reads_the_code_and_never_runs_it(folder: Path) -> None:
    package = folder / "pack"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "task.py").write_text("raise SystemExit('imported')\ndef build(data, train): ...\n")
    (folder / "task.py").write_text(TASK + "\nraise SystemExit('imported')\n")
    made = plan(folder, "model=pack.task:build")
    assert made.model.build == "pack.task:build"
    assert set(made.code) == {str(package / "task.py"), str(folder / "task.py")}
    assert "pack" not in sys.modules


def test_planning_stays_light(folder: Path) -> None:
    statement = (
        "import sys; from pathlib import Path; from dtrain.api import decide;"
        f"decide({str(folder / 'job.yaml')!r}); print(*(m for m in ('torch', 'numpy', 'ray') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""


# -- building ----------------------------------------------------------------------------------------------------


def options(folder: Path, text: str, name: str = "build") -> model.Options:
    (folder / "other.py").write_text("import torch, dtrain\nfrom torch import nn\n" + text)
    return model.resolve(model.Options(build=f"other.py:{name}"), folder)


def built(folder: Path, text: str) -> dtrain.Task:
    return model.build(options(folder, text), DataShape("custom"), Train(steps=1, seed=3))


def test_weights_are_the_seed_s(folder: Path) -> None:
    made = model.resolve(model.Options(build="task.py:build", options={"width": 5}), folder)
    first, again, other = (
        model.build(made, DataShape("custom"), Train(steps=1, seed=seed)).parts["model"].weight for seed in (3, 3, 4)
    )
    assert first.shape == (5, 3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


NETWORK = "class Net(nn.Linear):\n    def loss(self, batch):\n        return self(batch['inputs']).mean()\n"


@pytest.mark.parametrize(
    "text",
    [
        NETWORK + "def build(data, train): return Net(3, 1)\n",
        """
def loss(network, batch): return network(batch['inputs']).mean()
def build(data, train): return nn.Linear(3, 1), loss
""",
    ],
)
def test_a_network_with_a_loss_is_a_task(folder: Path, text: str) -> None:
    task = built(folder, text)
    calls = []
    part = task.parts["model"]

    class Wrapped(nn.Module):  # what a strategy would put around it: it must see the forward pass
        def forward(self, *args):
            calls.append(1)
            return part(*args)

    loss = task.loss("train", {"model": Wrapped()}, {"inputs": torch.ones(2, 3)})
    loss.backward()
    assert calls == [1]
    assert all(p.grad is not None for p in part.parameters())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def build(data, train): return {}", "gave a dict; it must give a dtrain.Task, a network that has"),
        ("def build(data, train): pass", "gave nothing; it must give"),
        ("def build(data, train): return nn.Linear(1, 1)", "gave Linear, a network without a method loss(batch)"),
        ("def build(data, train): return dtrain.Task({})", "a task without parts"),
    ],
)
def test_what_is_no_task_is_refused(folder: Path, text: str, message: str) -> None:
    with pytest.raises(TrainingError, match=r"other\.py:build") as error:
        built(folder, text)
    assert message in str(error.value)


def test_an_error_while_importing_names_file_and_line(folder: Path) -> None:
    made = options(folder, "\ndef f():\n    import no_such_module\nf()\ndef build(data, train): ...\n")
    with pytest.raises(TrainingError) as error:
        model.build(made, DataShape("custom"), Train(steps=1))
    assert str(error.value).startswith(
        f"{folder}/other.py:5: {folder}/other.py cannot be imported: ModuleNotFoundError"
    )
    lines = text_of(error.value).splitlines()
    assert lines[1] == f'  File "{folder}/other.py", line 6, in <module>'
    assert lines[-1] == "ModuleNotFoundError: No module named 'no_such_module'"


def test_helpers_beside_the_file_are_found_and_one_file_is_imported_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "task", raising=False)  # that of another test
    (folder / "helper.py").write_text("WIDTH = 6\n")
    (folder / "task.py").write_text("import helper\n" + TASK.replace("width=4", "width=helper.WIDTH"))
    made = plan(folder)
    task = model.build(made.model, DataShape("custom"), made.train)
    assert task.parts["model"].out_features == 6
    custom.open(made.data, folder)
    assert sys.modules["task"].__file__ == str(folder / "task.py")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "task.py").write_text("def build(data, train): return 'another'\n")
    function = code.load(f"{elsewhere}/task.py:build", str(elsewhere))
    assert function(None, None) == "another", "of the same name, and yet another file"


# -- data --------------------------------------------------------------------------------------------------------


def opened(folder: Path, text: str) -> custom.CustomSource:
    (folder / "other.py").write_text("import numpy as np, torch, random\n" + text)
    made = custom.resolve(custom.Options(open="other.py:open_data"), folder)
    return custom.open(made, folder)


def batch(dataset, *indices: int):
    return dataset.batch(np.asarray(indices), np.asarray(indices, dtype=np.uint64) + np.uint64(2**63))


def test_arrays_are_data(folder: Path) -> None:
    source = opened(
        folder,
        """
def open_data():
    return {"x": torch.arange(6.0).view(6, 1), "y": [1, 2, 3, 4, 5, 6]}, {"x": np.ones((2, 1)), "y": [0.5, 1]}
""",
    )
    assert (source.train.num_samples, source.held_out.num_samples) == (6, 2)
    found = batch(source.train, 4, 0)
    assert found["x"].tolist() == [[4.0], [0.0]]
    assert (found["y"].tolist(), found["y"].dtype) == ([5, 1], np.int64)
    assert batch(source.held_out, 0)["y"].dtype == np.float32


ITEMS = """
class Items:
    def __len__(self): return 5
    def __getitem__(self, i): return {sample}
def open_data(): return Items(), Items()
"""


@pytest.mark.parametrize(
    ("sample", "names"),
    [
        ("(torch.full((2,), float(i)), i)", ["inputs", "targets"]),
        ("{'a': np.zeros(2), 'b': i}", ["a", "b"]),
        ("torch.zeros(2)", ["inputs"]),
    ],
)
def test_a_dataset_of_samples_is_data(folder: Path, sample: str, names: list[str]) -> None:
    source = opened(folder, ITEMS.replace("{sample}", sample))
    found = batch(source.train, 3, 1, 1)
    assert list(found) == names
    assert {len(array) for array in found.values()} == {3}


def test_chance_in_a_sample_is_its_own(folder: Path) -> None:
    sample = "{'a': torch.rand(2), 'b': np.random.rand(), 'c': random.random()}"
    source = opened(folder, ITEMS.replace("{sample}", sample))
    together, alone = batch(source.train, 3, 1), batch(source.train, 1)
    for name in "abc":
        assert np.array_equal(together[name][1], alone[name][0])
        assert not np.array_equal(together[name][0], together[name][1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def open_data(): return 3", "gave a int; it must give (train, held_out)"),
        ("def open_data(): return {'x': [1, 2], 'y': [1]}, {'x': [1], 'y': [1]}", "found x 2, y 1"),
        ("def open_data(): return iter([]), iter([])", "cannot be read by index"),
        (ITEMS.replace("{sample}", "torch.zeros(i)"), "samples 3, 1 do not stack"),
        (ITEMS.replace("{sample}", "(1, 2, 3)"), "sample 3 is a tuple of 3"),
        (ITEMS.replace("{sample}", "('text', i)"), "a str in a sample is not numbers"),
    ],
)
def test_what_is_no_data_is_refused(folder: Path, text: str, message: str) -> None:
    with pytest.raises(TrainingError) as error:
        batch(opened(folder, text).train, 3, 1)
    assert message in str(error.value)


def test_a_fingerprint_changes_with_the_numbers(folder: Path) -> None:
    found = []
    for number in (3, 3, 4):
        found.append(opened(folder, f"def open_data(): return {{'x': [1, 2]}}, {{'x': [{number}]}}\n").fingerprint)
        del sys.modules["other"]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_the_shape_is_the_one_of_all_data() -> None:
    assert set(custom.Shape.__struct_fields__) == {field.name for field in fields(DataShape)}
    shaped = custom.Options(open="a.py:b", shape={"kind": "table", "num_features": 4, "num_classes": 2})
    assert custom.describe(shaped) == DataShape("table", num_features=4, num_classes=2)


# -- scripts -----------------------------------------------------------------------------------------------------


def script_job(folder: Path, text: str) -> Path:
    path = folder / "script.yaml"
    path.write_text(text)
    return path


def test_a_script_is_planned(folder: Path) -> None:
    path = script_job(folder, "name: s\nentrypoint: {script: task.py, args: [--lr, 1e-3, --n, 4]}\n")
    made = make_plan(load_job(path), a_cluster(), TWO_CORES, folder)
    assert isinstance(made, ScriptPlan)
    assert made.entrypoint.script == str(folder / "task.py")
    assert made.entrypoint.args == ("--lr", "1e-3", "--n", "4"), "as they are written"
    assert (made.workers.total, made.num_steps) == (2, 0)
    assert read_plan(made.to_json().encode(), "plan.json") == made
    assert list(made.code) == [str(folder / "task.py")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: s\nentrypoint: {script: no.py}", "script.yaml:2: entrypoint.script: {folder}/no.py cannot be read"),
        (
            "name: s\nentrypoint: {script: bad.py}",
            "script.yaml:2: entrypoint.script: {folder}/bad.py:1: invalid syntax",
        ),
        (
            "name: s\nentrypoint: {script: task.py}\nmodel: {name: mlp}\ntrain: {steps: 3}",
            "script.yaml:3: model stands beside entrypoint, which is at {path}:2: a script brings its own",
        ),
        (
            "name: s\nentrypoint: {script: task.py}\ncheckpoint: {}",
            "script.yaml:3: checkpoint stands beside entrypoint",
        ),
        ("name: s\ndata: {name: text}", "model is missing; add a mapping"),
        ("name: s\ndata: {name: text}", "or entrypoint: {{script: train.py}} to run a script of your own"),
        ("name: s\nentrypoint: {scrpt: task.py}", "entrypoint.scrpt is not a key; did you mean 'script'?"),
        ("name: s\nentrypoint: {script: task.py, args: [true]}", "entrypoint.args.0: expected"),
    ],
)
def test_a_mistake_in_a_script_job(folder: Path, text: str, message: str) -> None:
    (folder / "bad.py").write_text("def (\n")
    path = script_job(folder, text)
    with pytest.raises(InputError) as error, located(path, ()):
        make_plan(load_job(path), a_cluster(), TWO_CORES, folder)
    assert message.format(folder=folder, path=path) in str(error.value)
    assert "is not a key" not in str(error.value) or "scrpt" in text


def a_script_plan(folder: Path, **entrypoint) -> ScriptPlan:
    path = script_job(folder, f"name: s\nentrypoint: {json.dumps({'script': 'task.py', **entrypoint})}\n")
    return make_plan(load_job(path), a_cluster(storage=str(folder / "runs")), TWO_CORES, folder)


def test_a_script_finds_the_launch_that_torchrun_gives(folder: Path) -> None:
    from dtrain.runtime.script import environment

    made = a_script_plan(folder, environment={"OMP_NUM_THREADS": "7", "MY": "own"})
    args = {"rank": 1, "world": 2, "local_rank": 1, "local_world": 2, "node": 0, "generation": 3, "run": "/runs/s-k3f9"}
    found = environment(made, {**args, "restore": {"host": "127.0.0.1", "port": 4321}})
    expected = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "4321",
        "TORCHELASTIC_RUN_ID": "s-k3f9",
        "TORCHELASTIC_RESTART_COUNT": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "ACCELERATE_USE_CPU": "true",
        "DTRAIN_CHECKPOINT_DIR": "/runs/s-k3f9/checkpoints",
        "OMP_NUM_THREADS": "7",
        "MY": "own",
    }
    assert {key: found.get(key) for key in expected} == expected
    assert "CUDA_VISIBLE_DEVICES" not in found
    on_gpus = environment(made, {**args, "restore": {"host": "127.0.0.1", "port": 4321}, "gpus": ["2", "5"]})
    assert on_gpus["CUDA_VISIBLE_DEVICES"] == "2,5"


def test_a_script_run_is_shown_without_an_end_to_its_steps(folder: Path) -> None:
    from rich.console import Console

    from dtrain import runs
    from dtrain.view import follow, outcome, plan, tables

    made = a_script_plan(folder, args=["--lr", "1e-3"])
    run = runs.create(made, "")

    def said(what) -> str:
        out = Console(width=160)
        with out.capture() as caught:
            out.print(what)
        return caught.get()

    assert "task.py --lr 1e-3" in said(plan.show(made))
    assert "known to the script alone" in said(plan.show(made))
    assert "task.py --lr 1e-3, 2 CPU workers" in said(plan.start(run.id, made))
    attempt = runs.Attempt(number=1, started_at=1.0, from_step=0, source="script")
    run.update(state="running", attempts=(attempt,))
    assert "nothing reported yet" in said(tables.status(run))
    progress = follow.Progress()
    assert "nothing reported yet" in said(follow.panel(progress, run.record, 2.0, 120))
    for step in (10, 20):
        line = {"step": step, "attempt": 1, "loss": 0.5, "steps_per_s": 2.0, "time": 2.0, "my_figure": 0.125}
        run.metric(**line)
        progress.take(line)
    shown = said(follow.panel(progress, run.record, 2.0, 120))
    assert "step 20" in shown
    assert "left" not in shown
    assert "my figure 0.1250" in said(follow.Text("  ".join(map(" ".join, follow.training_figures(line)))))
    assert "my figure" in said(tables.metrics(run.metrics(), True)).splitlines()[0]
    assert "/" not in said(tables.ps([run], 120)).replace("steps/s", "")
    ended = replace(attempt, ended_at=3.0, last_step=20)
    record = run.update(state="succeeded", attempts=(ended,), outcome={"steps": 20, "metrics": {}}, ended_at=3.0)
    assert "to 20" in said(tables.status(run))
    assert "20 steps reported" in said(outcome.show(run, record))
    assert "dtrain sample" not in said(outcome.show(run, record))
    with pytest.raises(InputError, match=r"runs .*task\.py, and only that script knows its model"):
        run.task_plan  # noqa: B018
