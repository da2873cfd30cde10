"""Every mistake in a file at once, each with its line and the next move; and no file brings the reader down."""

import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dtrain import component
from dtrain.errors import InputError
from dtrain.spec import document
from dtrain.spec.cluster import ClusterSpec
from dtrain.spec.job import JobSpec
from dtrain.spec.load import load_both, load_cluster, load_job, located, where

MODEL, DATA = component.names("models")[0], "text"
GOOD = f"""\
name: tiny
model: {{name: {MODEL}}}
data: {{name: {DATA}}}
batch: {{global: 8}}
optimizer:
  name: adamw
  lr: 1e-3
train:
  steps: 10
"""
CLUSTER = "name: here\nbackend: {name: local}\n"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes `job.yaml` into an empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "job.yaml") -> str:
        Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
        return name

    return write


def mistakes(path: Any, overrides: Any = (), load: Any = load_job) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(path, overrides)
    return caught.value.message.splitlines()


def test_a_good_file_is_read_as_it_stands(file):
    job = load_job(file(GOOD))
    assert isinstance(job, JobSpec)
    assert (job.name, job.batch.global_size, job.optimizer.name, job.train.steps) == ("tiny", 8, "adamw", 10)
    assert job.optimizer.lr == 0.001
    assert isinstance(load_cluster(file(CLUSTER, "c.yaml")), ClusterSpec)


def test_the_shipped_files_are_good():
    root = Path(__file__).parents[2]
    for path in sorted((root / "jobs").glob("*.yaml")):
        load_job(path)
        assert "# yaml-language-server: $schema=job.schema.json" in path.read_text()
    for path in sorted((root / "clusters").glob("*.yaml")):
        load_cluster(path)
        assert "# yaml-language-server: $schema=cluster.schema.json" in path.read_text()


def test_every_mistake_is_reported_at_once_in_the_order_of_the_file(file):
    text = f"""\
name: ../x
model: {{name: {MODEL}x, foo: 1}}
data: {DATA}
batch:
  globl: 8
  micro: '4'
optimizer:
  name: adamw
  lr: -1
  betas: [0.9]
train:
  steps: ten
  compile: yes
  precision: bf61
evaluate:
checkpoint: {{every_steps: 1_000, keep: {{last: 2.0}}}}
train: {{steps: 10}}
"""
    found = mistakes(file(text))
    expected = [
        (1, "name: expected", "found '../x'"),
        (2, f"model.name: there is no model '{MODEL}x'", f"did you mean '{MODEL}'?"),
        (3, "data: expected a mapping", f"write {{name: {DATA}}}"),
        (5, "batch.globl is not a key", "did you mean 'global'?"),
        (6, "batch.micro: expected a whole number greater than 0", "found '4'; remove the quotes"),
        (9, "optimizer.lr: expected a number greater than 0", "found -1"),
        (10, "optimizer.betas: expected a list of 2", "found a list of 1"),
        (12, "train.steps: expected a whole number greater than 0", "found 'ten'"),
        (13, "train.compile: expected true or false", "found 'yes'; write true"),
        (14, "train.precision: expected one of: auto, fp32, bf16", "found 'bf61'; did you mean 'bf16'?"),
        (15, "evaluate: expected a mapping", "remove the key to take its default"),
        (16, "checkpoint.every_steps: expected a whole number", "found '1_000'; write 1000"),
        (16, "checkpoint.keep.last: expected a whole number", "found 2.0; write 2"),
        (17, "train is given twice, first at job.yaml:11", "remove one of them"),
    ]
    assert len(found) == len(expected), "\n".join(found)
    for line, (number, start, end) in zip(found, expected, strict=True):
        assert line.startswith(f"job.yaml:{number}: {start}"), line
        assert line.endswith(end), line


@pytest.mark.parametrize(
    ("written", "meant"),
    [("resnet", "cnn"), ("vgg16", "cnn"), ("lstm", "rnn"), ("gpt2", "transformer"), ("vae", "autoencoder")],
)
def test_a_network_is_found_by_the_name_it_is_known_by(file, written, meant):
    (line,) = mistakes(file(replaced(f"{{name: {MODEL}}}", f"{{name: {written}}}")))
    assert line.endswith(f"there is no model '{written}'; did you mean '{meant}'?")


def replaced(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (replaced("  steps: 10\n", "  steps: '10'\n"), "job.yaml:9: train.steps: *found '10'; remove the quotes"),
        (replaced("  steps: 10\n", "  steps: 0\n"), "job.yaml:9: train.steps: *greater than 0*found 0"),
        (replaced("  steps: 10\n", "  steps: 1e1\n"), "job.yaml:9: train.steps: *found 1e1; write 10"),
        (replaced("  steps: 10\n", "  steps: true\n"), "job.yaml:9: train.steps: *found true"),
        (replaced("  steps: 10\n", "  steps: 1e400\n"), "job.yaml:9: train.steps: *found 1e400"),
        (replaced("  steps: 10\n", f"  steps: {'9' * 30}\n"), "job.yaml:9: train.steps: *at most 1000000000*"),
        (replaced("  steps: 10\n", f"  steps: {'9' * 5000}\n"), "job.yaml:9: train.steps: *found 999*..."),
        (replaced("  steps: 10\n", f"  steps: -{'9' * 5000}\n"), "job.yaml:9: train.steps: *found -999*..."),
        (
            replaced("  steps: 10\n", "  log_every_steps: 1\n"),
            "job.yaml:8: train.steps is missing; add a whole number*",
        ),
        (replaced("lr: 1e-3", "lr: .nan"), "job.yaml:7: optimizer.lr: expected a number*found .nan"),
        (replaced("lr: 1e-3", "lr: .inf"), "job.yaml:7: optimizer.lr: expected a number*found .inf"),
        (replaced("lr: 1e-3", "lr: 1e300"), "job.yaml:7: optimizer.lr: *at most 1000*found 1e300"),
        (replaced("lr: 1e-3", "lr:"), "job.yaml:7: optimizer.lr: *found an empty value; give a value"),
        (replaced("  lr: 1e-3\n", ""), "job.yaml:5: optimizer.lr is missing; add a number greater than 0*"),
        (replaced("name: adamw", "name: adamx"), "job.yaml:6: optimizer.name: *'adamx'; did you mean 'adamw'?"),
        (replaced("name: adamw", "name: 7"), "job.yaml:6: optimizer.name: expected one of: adamw, sgd, found 7"),
        (replaced("  name: adamw\n", ""), "job.yaml:5: optimizer.name is missing; there is: adamw, sgd"),
        (replaced("name: adamw\n", "name: sgd\n  betas: [0, 0]\n"), "job.yaml:7: optimizer.betas is not a key*"),
        (replaced("name: adamw\n", "name: adamw\n  adamw: 1\n"), "job.yaml:7: optimizer.adamw is not a key*"),
        (replaced(f"{{name: {MODEL}}}", "{}"), "job.yaml:2: model.name is missing*"),
        (
            replaced("{global: 8}", "{global: 8, global_size: 8}"),
            "job.yaml:4: batch.global_size is not a key*'global'?",
        ),
        (replaced("{global: 8}", "8"), "job.yaml:4: batch: expected a mapping of global, micro, found 8"),
        (replaced("{global: 8}", "[1, 2]"), "job.yaml:4: batch: expected a mapping *found a list of 2"),
        (replaced("name: tiny", "name: 123"), "job.yaml:1: name: *found 123; put it in quotes"),
        (replaced("name: tiny", "name: a/../b"), "job.yaml:1: name: *found 'a/../b'"),
        (replaced("name: tiny\n", ""), "job.yaml:1: name is missing; add *"),
        (GOOD + "stratgy: {name: ddp}\n", "job.yaml:10: stratgy is not a key; did you mean 'strategy'?"),
        (GOOD + "1: 2\n", "job.yaml:10: expected a name as key, found 1; put it in quotes*"),
        (GOOD + "<<: {a: 1}\n", "job.yaml:10: merge keys*"),
        (GOOD + "description: !!python/name:os.system x\n", "job.yaml:10: tags (*) are not supported*"),
        (GOOD + "description: !!str 5\n", "job.yaml:10: tags (*) are not supported*"),
        (GOOD + "description: [a\n", "job.yaml:11: not valid YAML*"),
        (GOOD + "\tdescription: x\n", "job.yaml:10: not valid YAML: a tab where spaces belong; indent with spaces"),
        (GOOD + "description: a: b\n", "job.yaml:10: not valid YAML: a second `:` on one line*"),
        (GOOD + "---\nname: other\n", "job.yaml:10: a second document*"),
        (GOOD + 'description: "\\ud800"\n', "job.yaml:10: control character 0xd800*"),
        (GOOD + 'description: "\\0"\n', "job.yaml:10: control character 0x00*"),
        (GOOD + 'description: "\\U00110000"\n', "job.yaml:10: not valid YAML*"),
        (GOOD + "description: *nothing\n", "job.yaml:10: alias *nothing has no anchor above it*"),
        (GOOD + "evaluate: &a {x: *a}\n", "job.yaml:10: alias *a stands for a value that contains it*"),
        (GOOD + "description: " + "[" * 5000 + "\n", "job.yaml:10: nested more than 32 deep*"),
        (GOOD + "description:\n" + "- " * 5000 + "\n", "job.yaml:11: nested more than 32 deep*"),
        (GOOD + f"? {'k' * 300}\n: 1\n", "job.yaml:10: no key looks like 'kkk*"),
        ("", "job.yaml:1: the file is empty*"),
        ("# only a comment\n", "job.yaml:1: the file is empty*"),
        ("- a\n- b\n", "job.yaml:1: expected `key: value` lines, found a list of 2"),
        ("just text", "job.yaml:1: expected `key: value` lines, found 'just text'"),
        ("null", "job.yaml:1: expected `key: value` lines, found null"),
        (b"\x89PNG\r\n\x1a\n", "job.yaml:1: not a text file: byte 0x89 is not UTF-8*"),
        (b"name: a\nmodel: \x00\n", "job.yaml:2: not a text file: control character 0x00*"),
        (GOOD.encode("utf-16"), "job.yaml:1: not a text file: byte 0xff is not UTF-8; save it as UTF-8"),
    ],
    ids=lambda value: repr(value[-40:]) if isinstance(value, bytes) else value[-45:].strip() or "empty",
)
def test_one_mistake_is_one_line(file, text, expected):
    found = mistakes(file(text))
    assert len(found) == 1, "\n".join(found)
    assert fnmatchcase(found[0], expected.replace("[", "[[]").replace("?", "[?]")), found[0]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *[(word, True) for word in ("true", "True", "TRUE")],
        *[(word, None) for word in ("", "~", "null", "Null", "NULL")],
        *[
            (word, word)
            for word in ("yes", "no", "on", "off", "y", "1_000", "1:30", "2020-01-01", "nan", "inf", "e5", ".")
        ],
        *[("010", 10), ("0o10", 8), ("0x1f", 31), ("-7", -7), ("+7", 7), ("0b1", "0b1")],
        *[("1e-3", 0.001), ("1.", 1.0), (".5", 0.5), ("-1.5E+2", -150.0), ("1e3", 1000.0), (".inf", float("inf"))],
    ],
)
def test_scalars_are_yaml_1_2(written, value):
    found = document.resolve(written)
    assert (found, type(found)) == (value, type(value))


def test_aliases_stand_for_what_they_name_and_bombs_are_refused(file):
    shared = GOOD.replace("{global: 8}", "&eight {global: 8}") + "retry: {killed: &n 4, hung: *n}\n"
    assert load_job(file(shared)).retry.hung == 4
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 20)]
    started = time.monotonic()
    [line] = mistakes(file("\n".join(bomb)))
    assert line.startswith("job.yaml:4: more than 10000 values")
    deep = ["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 90))]
    assert "alias *a30 nests values more than 32 deep" in mistakes(file("\n".join(deep)))[0]
    assert time.monotonic() - started < 5


def test_a_huge_file_is_refused_before_it_is_parsed(file):
    path = Path(file(""))
    with path.open("wb") as out:
        out.truncate(100 * 2**20)
    started = time.monotonic()
    assert mistakes(path) == ["job.yaml: larger than 1024 KiB, so not a job or cluster file; name another one"]
    assert time.monotonic() - started < 1
    assert mistakes("/dev/zero")[0].startswith("/dev/zero: larger than 1024 KiB")


@pytest.mark.parametrize(
    "text",
    [
        "[" + "[]," * 300_000,
        "a: [" + "b," * 500_000,
        "\n".join(f"key{i}: 1" for i in range(90_000)),
        "\n".join(f"key{i}: 1" for i in range(4_900)),
        'a: "' + "\n" * 2**19,
        "a: " + "9" * 2**19,
        "? " + "a" * 2**19,
        "%" + "a" * 2**19,
    ],
    ids=["flow", "list", "keys", "allowed keys", "newlines", "digits", "key", "directive"],
)
def test_a_file_made_to_be_slow_is_refused_in_seconds(file, text):
    started = time.monotonic()
    found = mistakes(file(text))
    assert time.monotonic() - started < 5
    assert len(found) <= 51
    assert sum(map(len, found)) < 20_000


def test_a_missing_file_suggests_the_one_that_was_meant(file):
    Path("jobs").mkdir()
    file(GOOD, "jobs/gpt_small.yaml")
    said = "there is no such file; did you mean jobs/gpt_small.yaml?"
    for asked in ("jobs/gpt_smal.yaml", "gpt_small", "gpt_small.yaml", "job/gpt_small.yaml", "gpt_smal"):
        assert mistakes(asked) == [f"{asked}: {said}"]
    assert mistakes("jobs/another_thing.yaml") == ["jobs/another_thing.yaml: there is no such file"]
    assert mistakes("jobs") == ["jobs: this is a folder; name a file in it, such as jobs/gpt_small.yaml"]


def test_paths_that_cannot_be_opened_are_the_users_mistake(file, monkeypatch):
    assert mistakes("a\0b")[0].startswith("'a\\x00b': cannot be read: embedded null byte")
    assert "File name too long" in mistakes("x" * 5000)[0]
    assert "Not a directory" in mistakes(f"{file(GOOD)}/x")[0]
    Path("loop").symlink_to("loop")
    assert "loop" in mistakes("loop")[0]

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert mistakes("job.yaml")[0].startswith("job.yaml: not allowed to read this file; try `chmod u+r`")


def test_a_key_can_be_located_afterwards(file):
    path = file(GOOD)
    assert where(path, "train.steps") == "job.yaml:9"
    assert where(path, "train.seed") == "job.yaml:8"
    assert where(path, "retry.killed") == "job.yaml:1"
    assert where(path, "train.steps", ["train.steps=5"]) == "--set train.steps=5"


LINES = GOOD.splitlines(keepends=True)
SNIPPETS = [
    "{",
    "}",
    "[",
    "]",
    ":",
    ": ",
    "- ",
    "? ",
    "&a ",
    "*a",
    "<<: ",
    "!!int ",
    "|\n",
    ">\n",
    "'",
    '"',
    "\t",
    "%",
    "---\n",
]
SNIPPETS += [
    "...\n",
    "#",
    "\n",
    "  ",
    ".nan",
    "-.inf",
    "1e999",
    "name",
    "9" * 5000,
    '"\\ud800"',
    '"\\U00110000"',
    "\x00",
    "\ufeff",
]


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(lambda text: text.encode(errors="replace")),
        st.lists(st.sampled_from(LINES + SNIPPETS), max_size=25).map(lambda parts: "".join(parts).encode()),
    ),
    st.lists(
        st.text(max_size=20) | st.sampled_from(["train.steps=5", "name.x=1", "batch={", "a=*b", "=", "."]), max_size=2
    ),
)
@example(b"\xef\xbb\xbfname: a", [])
@example(b"%YAML 1." + b"9" * 5000 + b"\n---\na: 1", [])
@example(GOOD.encode(), ["train.steps=\ud800", "\ud800=1", "train.seed=1\n"])
def test_any_bytes_are_a_job_or_an_input_error(tmp_path_factory, data, overrides):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(data)
    for load, kind in ((load_job, JobSpec), (load_cluster, ClusterSpec)):
        try:
            assert isinstance(load(path, overrides), kind)
        except InputError as error:
            assert error.message
            assert all(line.startswith((str(path), "--set ")) for line in error.message.split("\n"))


KEYS = ["name", "model", "train", "train.steps", "batch.global", "optimizer", "optimizer.betas", "optimizer.lr"]
KEYS += ["evaluate.every_steps", "schedule.name", "strategy"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
MAPPING_KEYS = st.text(max_size=5) | st.sampled_from(["name", "lr", "steps"])


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(KEYS),
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(MAPPING_KEYS, inner, max_size=3),
        max_leaves=5,
    ),
)
def test_any_value_at_any_key_is_a_job_or_an_input_error(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "value.yaml"
    path.write_text(GOOD)
    written = yaml.safe_dump(value, default_flow_style=True, width=2**20).removesuffix("\n...\n")
    try:
        load_job(path, [f"{key}={written}"])
    except InputError as error:
        assert all(line.startswith(("--set ", str(path))) for line in error.message.split("\n"))


def test_a_job_and_its_cluster_are_read_together(file):
    job, cluster = file(GOOD), file(CLUSTER, "here.yaml")
    asked, place = load_both(job, cluster, ["train.steps=5", "cluster.nodes=2"])
    assert (asked.train.steps, place.nodes) == (5, 2)
    assert load_both(job, None, [])[1].backend.name == "local"
    with pytest.raises(InputError) as caught:
        load_both(job, cluster, ["train.stesp=5", "cluster.nodse=2"])
    assert [line.partition(": ")[0] for line in caught.value.message.splitlines()] == [
        "--set train.stesp=5",
        "--set cluster.nodse=2",
    ]


def test_what_planning_finds_is_located_in_the_file(file):
    job = file(GOOD)
    said = "batch.global 8 is not a multiple of 3 workers; nearest: 9"
    with pytest.raises(InputError) as caught, located(job, []):
        raise InputError(said)
    assert caught.value.message == f"job.yaml:4: {said}"
    with pytest.raises(InputError) as caught, located(job, ["batch.global=8"]):
        raise InputError(said)
    assert caught.value.message == f"--set batch.global=8: {said}"
    with pytest.raises(InputError) as caught, located(job, []):
        raise InputError("this machine has no GPU")
    assert caught.value.message == "this machine has no GPU"
