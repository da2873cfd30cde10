"""pydantic's errors as mistakes of a file, found by walking the schema and the document side by side."""

import difflib
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

from pydantic_core import ErrorDetails

from dtrain.component import Options, suggestion
from dtrain.spec import document, words
from dtrain.spec.document import Node, found

NUM_LETTERS = 3
"""Of a word that is looked for in descriptions: shorter ones are everywhere."""
YES_NO = {"yes": "true", "y": "true", "on": "true", "no": "false", "n": "false", "off": "false"}


def in_words(errors: Sequence[ErrorDetails], spec: type[Options], root: Node) -> list[tuple[str, str]]:
    """Each mistake as (where, what and the next move); `errors` are those of `spec` on the document at `root`."""
    places = [(error, _Place(spec, root, error)) for error in errors]
    misnamed = [place.path[:-1] for _, place in places if place.choice]
    mistyped = {(place.path[:-1], place.nearest_key) for error, place in places if error["type"] == "extra_forbidden"}
    by_path: dict[tuple[str, ...], tuple[str, str]] = {}
    for error, place in places:
        # What else is wrong with a component that does not exist says nothing.
        if any(place.path[: len(m)] == m for m in misnamed) and not place.choice:
            continue
        # A mistyped key beside it already tells of this one.
        if error["type"] == "missing" and (place.path[:-1], place.path[-1]) in mistyped:
            continue
        # A union reports each of its members: one mistake a place is enough.
        by_path.setdefault(place.path, (place.where, _explain(error, place)))
    return list(by_path.values())


class _Place:
    """Where an error's location leads: the type that was expected there and what stands there."""

    def __init__(self, spec: type[Options], root: Node, error: ErrorDetails) -> None:
        self.annotation: Any = spec
        self.node: Node | None = root
        self.where = root.where
        self.path: tuple[str, ...] = ()
        self.keys: list[str] = []
        """Keys known beside the last part of the path."""
        self.has_default = False
        self.choice: dict[str, type[Options]] | None = None
        """Components by name, where the place is the `name` that should be one of them."""
        location = error["loc"]
        if error["type"] == "missing" and isinstance(location[-1], int):
            location = location[:-1]  # a list lacks an element: it is the list that is wrong
        for part in location:
            self._step(part)
        if error["type"] == "union_tag_invalid":
            self.choice = words.components(self.annotation)
            self._descend("name", None)

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
            self.choice = names if part == "name" and names else None
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
    def nearest_key(self) -> str | None:
        return next(iter(difflib.get_close_matches(self.path[-1], self.keys, n=1, cutoff=0.6)), None)

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
    if place.choice:
        return _no_such(".".join(place.path[:-1]), place.node, place.choice)
    if kind in ("value_error", "assertion_error"):
        reason = str(error.get("ctx", {}).get("error", error["msg"]))
        return f"{dotted}: {reason}" if dotted else reason
    if place.node is None:
        return f"{dotted}: {error['msg']}"
    what = f"{dotted}: expected {words.expected(place.annotation)}, found {found(place.node)}"
    return what + _hint(place.node, place)


def _no_such(folder: str, node: Node | None, known: dict[str, type[Options]]) -> str:
    if node is None or not isinstance(node.value, str):
        stands = found(node) if node else "nothing"
        return f"{folder}.name: expected one of: {', '.join(known)}, found {stands}"
    meant = _that_speaks_of(node.value, known)
    near = f"; did you mean {meant!r}?" if meant else suggestion(node.value, known)
    return f"{folder}.name: there is no {folder} {found(node)}{near}"


def _that_speaks_of(word: str, known: dict[str, type[Options]]) -> str | None:
    """The one component that has the word in its description, or among what it lets choose: `resnet` is `cnn`."""
    wanted = _letters(word)
    speak = []
    for name, component in known.items():
        fields = words.fields(component).values()
        said = [sys.modules[component.__module__].__doc__ or "", component.__doc__ or ""]
        said += [str(choice) for field in fields for choice in words.choices(words.annotation_of(field))]
        if any(_letters(one).startswith(wanted) for text in said for one in text.split()):
            speak.append(name)
    return speak[0] if len(speak) == 1 and len(wanted) >= NUM_LETTERS else None


def _letters(word: str) -> str:
    return re.sub(r"[\W_]", "", word.lower())


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
