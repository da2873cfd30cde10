"""Job and cluster files, read strictly: every mistake at once, each as `file:line: what; next move`."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pydantic

from dtrain.component import Options
from dtrain.errors import InputError
from dtrain.spec import document, words
from dtrain.spec.cluster import ClusterSpec
from dtrain.spec.document import Node
from dtrain.spec.job import JobSpec
from dtrain.spec.mistakes import in_words
from dtrain.spec.overrides import CLUSTER, apply_overrides, split_overrides

MAX_MISTAKES = 50
"""Lines of one message."""
THIS_MACHINE = "{name: local, description: The machine at hand., backend: {name: local}}"
"""`clusters/local.yaml`, for when no cluster file is given and that one is not at hand."""
Spec = TypeVar("Spec", bound=Options)


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """The job in a YAML file, changed by `overrides` (`train.steps=100`).

    Raises `InputError` with one line a mistake, all of them at once.
    """
    return _load(JobSpec, path, overrides, "")


def load_cluster(path: str | Path | None, overrides: Sequence[str] = ()) -> ClusterSpec:
    """The cluster in a YAML file, or this machine for None, changed by `overrides` (`cluster.nodes=2`).

    Raises `InputError` with one line a mistake, all of them at once.
    """
    return _load(ClusterSpec, path, overrides, CLUSTER)


def load_both(job: str | Path, cluster: str | Path | None, overrides: Sequence[str]) -> tuple[JobSpec, ClusterSpec]:
    """A job, and the cluster it is to run on; each takes its own of the overrides.

    Raises `InputError` with the mistakes of both.
    """
    for_job, for_cluster = split_overrides(overrides)
    mistakes: list[str] = []
    try:
        asked = load_job(job, for_job)
    except InputError as error:
        mistakes.append(error.message)
    try:
        place = load_cluster(cluster, for_cluster)
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
        if key.split(".")[0] not in words.fields(JobSpec):
            raise
        for_job, _ = split_overrides(overrides)
        raise InputError(f"{where(path, key, for_job)}: {error.message}") from None


def where(path: str | Path, key: str, overrides: Sequence[str] = ()) -> str:
    """Where a dotted key of a file was given: `jobs/x.yaml:4`, or the nearest line above it that was."""
    root = document.read(path)
    apply_overrides(root, overrides, prefix=CLUSTER)
    node = root
    for part in key.split("."):
        if not isinstance(node.value, dict) or part not in node.value:
            break
        node = node.value[part]
    return node.where


def _this_machine() -> Node:
    root = document.parse(THIS_MACHINE, "this machine", fixed_where=True)
    assert root is not None
    return root


def _load(spec: type[Spec], path: str | Path | None, overrides: Sequence[str], prefix: str) -> Spec:
    root = document.read(path) if path is not None else _this_machine()
    apply_overrides(root, overrides, prefix=prefix)
    mistakes, result = list(root.mistakes), None
    try:
        # Through JSON, where strictness lets a list be a tuple. Files say aliases (`global`) only.
        result = spec.model_validate_json(json.dumps(root.plain()), strict=True, by_alias=True, by_name=False)
    except pydantic.ValidationError as error:
        mistakes += in_words(error.errors(include_url=False), spec, root)
    mistakes += _without_name(spec, root)
    if result is not None and not mistakes:
        return result
    lines = [f"{at}: {what}" for at, what in sorted(dict.fromkeys(mistakes), key=_line)]
    if len(lines) > MAX_MISTAKES:
        lines = [*lines[:MAX_MISTAKES], f"{path or 'this machine'}: and {len(lines) - MAX_MISTAKES} more mistakes"]
    raise InputError("\n".join(lines))


def _line(mistake: tuple[str, str]) -> int:
    at = mistake[0]
    number = re.search(r":(\d+)\Z", at)
    return int(number[1]) if number and not at.startswith("--set ") else 2**31


def _without_name(spec: type[Options], root: Node) -> list[tuple[str, str]]:
    """Components given without a name where there is a single one to choose, which pydantic would fill in."""
    mistakes = []
    for key, field in words.fields(spec).items():
        names = words.components(words.annotation_of(field))
        node = root.value.get(key)
        if len(names) == 1 and node and isinstance(node.value, dict) and "name" not in node.value:
            mistakes.append((node.where, f"{key}.name is missing; there is: {', '.join(names)}"))
    return mistakes
