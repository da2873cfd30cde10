"""Job and cluster files, read strictly: every mistake at once, each as `file:line: what; next move`."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from dtrain.errors import InputError
from dtrain.settings import Settings, convert
from dtrain.spec import document, words
from dtrain.spec.cluster import ClusterSpec
from dtrain.spec.document import Node
from dtrain.spec.job import SHORT_FORMS, JobSpec, ScriptSpec
from dtrain.spec.overrides import CLUSTER, apply_overrides, split_overrides

MAX_MISTAKES = 50
"""Lines of one message."""
THIS_MACHINE = "{name: local, description: The machine at hand., backend: {name: local}}"
"""`clusters/local.yaml`, for when no cluster file is given and that one is not at hand."""
ENTRYPOINT = "entrypoint"
Spec = TypeVar("Spec", bound=Settings)


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec | ScriptSpec:
    """The job in a YAML file, changed by `overrides` (`train.steps=100`); a `ScriptSpec` where it has an `entrypoint`.

    Raises `InputError` with one line a mistake, all of them at once.
    """
    return job_of(document.read(path), overrides)


def job_of(root: Node, overrides: Sequence[str] = ()) -> JobSpec | ScriptSpec:
    """The same of a document that was read before."""
    _spell_out(root)
    for setting in overrides:
        apply_overrides(root, [setting])
        _spell_out(root)
    if ENTRYPOINT not in root.value:
        return _checked(JobSpec, root)
    return _checked(ScriptSpec, root)


def load_cluster(path: str | Path | None, overrides: Sequence[str] = ()) -> ClusterSpec:
    """The cluster in a YAML file, or this machine for None, changed by `overrides` (`cluster.nodes=2`).

    Raises `InputError` with one line a mistake, all of them at once.
    """
    return cluster_of(document.read(path) if path is not None else this_machine(), overrides)


def cluster_of(root: Node, overrides: Sequence[str] = ()) -> ClusterSpec:
    """The same of a document that was read before."""
    apply_overrides(root, overrides, prefix=CLUSTER)
    return _checked(ClusterSpec, root)


def load_both(
    job: str | Path, cluster: str | Path | None, overrides: Sequence[str]
) -> tuple[JobSpec | ScriptSpec, ClusterSpec]:
    """A job, and the cluster it is to run on; each takes its own of the overrides.

    Raises `InputError` with the mistakes of both.
    """
    return both_of(
        lambda: document.read(job), lambda: document.read(cluster) if cluster is not None else this_machine(), overrides
    )


def both_of(
    job: Callable[[], Node], cluster: Callable[[], Node], overrides: Sequence[str]
) -> tuple[JobSpec | ScriptSpec, ClusterSpec]:
    """The same of documents that come from elsewhere."""
    for_job, for_cluster = split_overrides(overrides)
    mistakes: list[str] = []
    try:
        asked = job_of(job(), for_job)
    except InputError as error:
        mistakes.append(error.message)
    try:
        place = cluster_of(cluster(), for_cluster)
    except InputError as error:
        mistakes.append(error.message)
    if mistakes:
        raise InputError("\n".join(mistakes))
    return asked, place


@contextmanager
def located(path: str | Path, overrides: Sequence[str]) -> Iterator[None]:
    """Put file and line before a mistake that is found later, in planning, and begins with a key of the job."""
    try:
        yield
    except InputError as error:
        key = error.message.split(" ", 1)[0].rstrip(":")
        if key.split(".")[0] not in {**words.fields(JobSpec), **words.fields(ScriptSpec)}:
            raise
        for_job, _ = split_overrides(overrides)
        raise InputError(f"{where(path, key, for_job)}: {error.message}") from None


def where(path: str | Path, key: str, overrides: Sequence[str] = ()) -> str:
    """Where a dotted key of a file was given: `jobs/x.yaml:4`, or the nearest line above it that was."""
    root = document.read(path)
    _spell_out(root)
    apply_overrides(root, overrides, prefix=CLUSTER)
    node = root
    for part in key.split("."):
        if not isinstance(node.value, dict) or part not in node.value:
            break
        node = node.value[part]
    return node.where


def this_machine() -> Node:
    """The cluster that is meant where none is named."""
    root = document.parse(THIS_MACHINE, "this machine", fixed_where=True)
    assert root is not None
    return root


def _spell_out(root: Node) -> None:
    """Write short forms out: `model: ./task.py:build`. A script's arguments are texts, numbers too as they stand."""
    script = root.value.get(ENTRYPOINT)
    arguments = script.value.get("args") if script is not None and isinstance(script.value, dict) else None
    for argument in arguments.value if arguments is not None and isinstance(arguments.value, list) else ():
        if type(argument.value) in (int, float):
            argument.value = argument.written
    for key, (name, option) in SHORT_FORMS.items():
        node = root.value.get(key)
        if node is not None and isinstance(node.value, str) and ":" in node.value:
            reference = Node(node.value, node.where, node.written)
            root.value[key] = Node({"name": Node(name, node.where), option: reference}, node.where)


def _checked(spec: type[Spec], root: Node) -> Spec:
    mistakes, result = list(root.mistakes), None
    try:
        result = convert(root.plain(), spec)
    except msgspec.ValidationError:
        from dtrain.spec.mistakes import mistakes_in

        mistakes += mistakes_in(root, spec)
    mistakes = _of_either_kind(spec, root, mistakes)
    if result is not None and not mistakes:
        return result
    lines = [f"{at}: {what}" for at, what in sorted(dict.fromkeys(mistakes), key=_line)]
    if len(lines) > MAX_MISTAKES:
        file = re.sub(r":\d+\Z", "", root.where)
        lines = [*lines[:MAX_MISTAKES], f"{file}: and {len(lines) - MAX_MISTAKES} more mistakes"]
    raise InputError("\n".join(lines))


def _of_either_kind(spec: type[Settings], root: Node, mistakes: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A job has a model or a script: what is said where it has both, or neither."""
    if spec is JobSpec:
        of_model = "model is missing;"
        also = f", or {ENTRYPOINT}: {{script: train.py}} to run a script of your own"
        return [(at, what + also if what.startswith(of_model) else what) for at, what in mistakes]
    if spec is not ScriptSpec:
        return mistakes
    both = [key for key in words.fields(JobSpec) if key in root.value and key not in words.fields(ScriptSpec)]
    said = [f"{key} is not a key" for key in both]
    kept = [(at, what) for at, what in mistakes if not what.startswith(tuple(said))]
    at_both = f"stands beside {ENTRYPOINT}, which is at {root.value[ENTRYPOINT].where}"
    return kept + [
        (root.value[key].where, f"{key} {at_both}: a script brings its own; remove one of the two") for key in both
    ]


def _line(mistake: tuple[str, str]) -> int:
    at = mistake[0]
    number = re.search(r":(\d+)\Z", at)
    return int(number[1]) if number and not at.startswith("--set ") else 2**31
