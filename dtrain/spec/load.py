"""Job and cluster files, read strictly: every mistake at once, each as `file:line: what; next move`."""

import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic_core import ErrorDetails

from dtrain.component import Options, suggestion
from dtrain.errors import InputError
from dtrain.spec import document, words
from dtrain.spec.cluster import ClusterSpec
from dtrain.spec.document import Node, found
from dtrain.spec.job import JobSpec
from dtrain.spec.overrides import CLUSTER, apply_overrides, split_overrides

MAX_MISTAKES = 50
YES_NO = {"yes": "true", "y": "true", "on": "true", "no": "false", "n": "false", "off": "false"}
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
        mistakes += _Translation(spec, root).of(error.errors(include_url=False))
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


class _Translation:
    """pydantic's errors as mistakes of a file, by walking the schema and the document side by side."""

    def __init__(self, spec: type[Options], root: Node) -> None:
        self.spec, self.root = spec, root

    def of(self, errors: Sequence[ErrorDetails]) -> list[tuple[str, str]]:
        places = [(error, _Place(self.spec, self.root, _location(error))) for error in errors]
        misnamed = [place.path[:-1] for _, place in places if place.is_component_name]
        # A union reports each of its members: one mistake a place is enough.
        by_path: dict[tuple[str, ...], tuple[str, str]] = {}
        for error, place in places:
            # What else is wrong with a component that does not exist says nothing.
            if any(place.path[: len(m)] == m for m in misnamed) and not place.is_component_name:
                continue
            if error["type"] == "missing" and self._meant_by_another(place, places):
                continue
            by_path.setdefault(place.path, (place.where, _explain(error, place)))
        return list(by_path.values())

    @staticmethod
    def _meant_by_another(missing: "_Place", places: "Sequence[tuple[ErrorDetails, _Place]]") -> bool:
        """Whether a mistyped key beside it already tells of this one."""
        return any(
            error["type"] == "extra_forbidden"
            and place.path[:-1] == missing.path[:-1]
            and difflib.get_close_matches(place.path[-1], place.keys, n=1, cutoff=0.6) == [missing.path[-1]]
            for error, place in places
        )


def _location(error: ErrorDetails) -> tuple[int | str, ...]:
    """Of an element that a list lacks: the list."""
    location = error["loc"]
    return location[:-1] if error["type"] == "missing" and isinstance(location[-1], int) else location


class _Place:
    """Where an error's location leads: the type that was expected there and what stands there."""

    def __init__(self, spec: type[Options], root: Node, location: Sequence[int | str]) -> None:
        self.annotation: Any = spec
        self.node: Node | None = root
        self.where = root.where
        self.path: tuple[str, ...] = ()
        self.keys: list[str] = []
        """Keys known beside the last part of the path."""
        self.has_default = False
        self.is_component_name = False
        for part in location:
            self._step(part)

    def _step(self, part: int | str) -> None:
        names = words.components(self.annotation)
        if len(names) > 1 and part in names:
            self.annotation = names[str(part)]  # pydantic puts the chosen name into the location
            return
        model = words.model_of(self.annotation)
        if model is not None and isinstance(part, str):
            known = words.fields(model)
            self.keys = list(known)
            field = known.get(part)
            self.is_component_name = part == "name" and bool(names)
            self.has_default = field is not None and not field.is_required()
            self._descend(part, words.annotation_of(field) if field else None)
        elif isinstance(part, int) and (element := words.element_of(self.annotation, part)) is not None:
            self._descend(part, element)
        elif isinstance(part, str) and (value := words.value_of(self.annotation)) is not None:
            self._descend(part, value)
        # Else it names the member of a union that was tried, which is no place in the file.

    def _descend(self, part: int | str, annotation: Any) -> None:
        self.annotation = annotation
        self.path = (*self.path, str(part))
        value = self.node.value if self.node else None
        child = None
        if isinstance(value, dict):
            child = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            child = value[part]
        self.node = child
        if child is not None:
            self.where = child.where

    @property
    def dotted(self) -> str:
        return ".".join(self.path)


def _explain(error: ErrorDetails, place: _Place) -> str:
    """What is wrong and the next move."""
    kind, dotted = error["type"], place.dotted
    names = words.components(place.annotation)
    if kind == "missing" and place.node is None:
        return f"{dotted} is missing; add {words.expected(place.annotation)}"
    if kind == "extra_forbidden":
        return f"{dotted} is not a key{suggestion(place.path[-1], place.keys)}"
    if kind == "union_tag_not_found":
        return f"{dotted}.name is missing; there is: {', '.join(names)}"
    if kind == "union_tag_invalid":
        node = place.node.value["name"] if place.node else None
        place.where = node.where if node else place.where
        return _no_such(dotted, node, list(names))
    if place.is_component_name:
        return _no_such(".".join(place.path[:-1]), place.node, words.choices(place.annotation))
    if kind in ("value_error", "assertion_error"):
        reason = str(error.get("ctx", {}).get("error", error["msg"]))
        return f"{dotted}: {reason}" if dotted else reason
    if place.node is None:
        return f"{dotted}: {error['msg']}"
    what = f"{dotted}: expected {words.expected(place.annotation)}, found {found(place.node)}"
    return what + _hint(place.node, place)


def _no_such(folder: str, node: Node | None, known: list[str]) -> str:
    if node is None or not isinstance(node.value, str):
        stands = found(node) if node else "nothing"
        return f"{folder}.name: expected one of: {', '.join(known)}, found {stands}"
    return f"{folder}.name: there is no {folder} {found(node)}{suggestion(node.value, known)}"


def _hint(node: Node, place: _Place) -> str:
    """The next move, where more can be said than what was expected."""
    kind, value = place.annotation, node.value
    names = words.components(kind)
    if value is None:
        return "; give a value, or remove the key to take its default" if place.has_default else "; give a value"
    if names and isinstance(value, str):
        near = difflib.get_close_matches(value, names, n=1, cutoff=0.6) or list(names)
        return f"; write {{name: {near[0]}}}"
    if isinstance(value, str):
        if words.accepts(kind, bool) and value.lower() in YES_NO:
            return f"; write {YES_NO[value.lower()]}"
        plain = document.resolve(value)
        if node.quoted and type(plain) is not str and words.accepts(kind, type(plain)):
            return "; remove the quotes"
        ungrouped = document.resolve(value.replace("_", ""))
        if type(ungrouped) in (int, float) and words.accepts(kind, type(ungrouped)):
            return f"; write {value.replace('_', '')}"
        near = difflib.get_close_matches(value, words.choices(kind), n=1, cutoff=0.6)
        return f"; did you mean {near[0]!r}?" if near else ""
    if words.accepts(kind, str) and not isinstance(value, dict | list):
        return "; put it in quotes"
    if isinstance(value, float) and math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"; write {int(value)}" if words.accepts(kind, int) and not words.accepts(kind, float) else ""
    return ""
