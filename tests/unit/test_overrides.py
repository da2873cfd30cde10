"""`--set a.b=c`: checked by the schema of the file, and named in what is said about it."""

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from dtrain import component
from dtrain.errors import InputError
from dtrain.spec.load import load_cluster, load_job
from dtrain.spec.overrides import split_overrides

JOB = f"""\
name: tiny
model: {{name: {component.names("models")[0]}}}
data: {{name: {"text"}}}
batch: {{global: 8}}
optimizer: {{name: adamw, lr: 0.1}}
train: {{steps: 10}}
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "cluster.yaml").write_text("name: here\nbackend: {name: local}\n")
    return "job.yaml"


def mistakes(path, *overrides, load=load_job):
    with pytest.raises(InputError) as caught:
        load(path, overrides)
    return caught.value.message.splitlines()


def test_values_are_typed_by_the_schema(job):
    spec = load_job(
        job,
        [
            "train.steps=20",
            "batch.global=16",
            "optimizer.lr=1e-4",
            "optimizer.betas=[0.8, 0.9]",
            "evaluate.every_steps=null",
            "retry.killed=1",
            "checkpoint.keep.last=7",
            "checkpoint.keep.best=0",
            "schedule={name: wsd, warmup_steps: 3}",
            "train.clip_grad_norm=",
            "description='a = b, c: d'",
            "train.steps=30",
        ],
    )
    assert spec.train.steps == 30
    assert spec.batch.global_size == 16
    assert (spec.optimizer.lr, spec.optimizer.betas) == (1e-4, (0.8, 0.9))
    assert spec.evaluate.every_steps is None
    assert spec.retry.killed == 1
    assert (spec.checkpoint.keep.last, spec.checkpoint.keep.best) == (7, 0)
    assert (spec.schedule.name, spec.schedule.warmup_steps) == ("wsd", 3)
    assert spec.train.clip_grad_norm is None
    assert spec.description == "a = b, c: d"


def test_a_component_can_be_chosen(job):
    spec = load_job(job, ["optimizer.name=sgd", "optimizer.momentum=0.5"])
    assert (spec.optimizer.name, spec.optimizer.momentum) == ("sgd", 0.5)
    [line] = mistakes(job, "optimizer.name=adam")
    assert line == "--set optimizer.name=adam: optimizer.name: there is no optimizer 'adam'; did you mean 'adamw'?"
    [line] = mistakes(job, "model.name=nothing-like-it")
    assert line.startswith("--set model.name=nothing-like-it: model.name: there is no model")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stesp=5", "train.stesp is not a key; did you mean 'steps'?"),
        ("tran.steps=5", "tran is not a key; did you mean 'train'?"),
        ("train.steps=ten", "train.steps: expected a whole number greater than 0 and at most 1000000000, found 'ten'"),
        ("train.steps='5'", "train.steps: expected a whole number *found '5'; remove the quotes"),
        ("train.steps=1 2", "train.steps: expected a whole number *found '1 2'"),
        ("train.steps=", "train.steps: expected a whole number *found an empty value; give a value"),
        ("train.compile=yes", "train.compile: expected true or false, found 'yes'; write true"),
        ("train.steps.x=1", "train.steps is 10 at job.yaml:6, so it has no keys; set it as a whole"),
        ("optimizer.lr=[1", "not valid YAML: *"),
        ("optimizer.lr=*x", "alias *x has no anchor above it; write the value out"),
        ("optimizer={name: sgd, name: sgd, lr: 1}", "name is given twice, first at --set *; remove one of them"),
        ("train.steps", "expected key=value with a dotted key, such as train.steps=100"),
        ("=5", "expected key=value with a dotted key, such as train.steps=100"),
        ("train..steps=5", "expected key=value with a dotted key, such as train.steps=100"),
        ("cluster.nodes=2", "cluster is not a key*"),
    ],
)
def test_a_mistake_names_the_override(job, override, said):
    [line] = mistakes(job, override)
    assert line.startswith(f"--set {override}: ")
    assert fnmatchcase(line.removeprefix(f"--set {override}: "), said.replace("[", "[[]").replace("?", "[?]")), line


@pytest.mark.parametrize("override", ["train\n.steps=5", "\ud800=5", "a\x00b=1"])
def test_what_cannot_be_printed_is_escaped(job, override):
    [line] = mistakes(job, override)
    assert line == f"--set {override!a}: expected key=value with a dotted key, such as train.steps=100"


def test_mistakes_of_the_file_and_of_overrides_come_together(job):
    Path(job).write_text(JOB + "evaluat: {}\n")
    found = mistakes(job, "train.stesp=5", "nothing", "name=Ä")
    assert [line.partition(": ")[0] for line in found] == [
        "job.yaml:7",
        "--set nothing",
        "--set name=Ä",
        "--set train.stesp=5",
    ]


def test_cluster_overrides_go_to_the_cluster_file(job):
    mine, theirs = split_overrides(["train.steps=5", "cluster.nodes=2", "cluster.backend.home=/x", "name=clusters"])
    assert (mine, theirs) == (["train.steps=5", "name=clusters"], ["cluster.nodes=2", "cluster.backend.home=/x"])
    cluster = load_cluster("cluster.yaml", theirs)
    assert (cluster.nodes, cluster.backend.home) == (2, "/x")
    [line] = mistakes("cluster.yaml", "cluster.nodse=2", load=load_cluster)
    assert line == "--set cluster.nodse=2: nodse is not a key; did you mean 'nodes'?"
