"""What is wrong with a file, in words: every mistake at once, found by walking the schema and the document together."""

import difflib
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from dtrain.component import suggestion
from dtrain.settings import Settings, Unfit, convert
from dtrain.spec import document, words
from dtrain.spec.document import Node, found

NUM_LETTERS = 3
"""Of a word that is looked for in descriptions: shorter ones are everywhere."""
YES_NO = {"yes": "true", "y": "true", "on": "true", "no": "false", "n": "false", "off": "false"}
Mistake = tuple[str, str]
"""Where, and what with the next move."""


def mistakes_in(root: Node, spec: type[Settings]) -> list[Mistake]:
    """All that keeps the document at `root` from being what `spec` describes; empty where nothing does."""
    return list(_of_settings(_Place(spec, root, ""), spec))


@dataclass
class _Place:
    """The type that is expected at a place of a document, and what stands there."""

    annotation: Any
    node: Node
    dotted: str
    has_default: bool = False

    def below(self, key: str | int, annotation: Any, has_default: bool = False) -> "_Place":
        return _Place(annotation, self.node.value[key], self.at(key), has_default)

    def at(self, key: str | int) -> str:
        return f"{self.dotted}.{key}" if self.dotted else str(key)

    def says(self, what: str) -> Mistake:
        return self.node.where, f"{self.dotted}: {what}" if self.dotted else what


def _of(place: _Place) -> Iterator[Mistake]:
    kind, value = place.annotation, place.node.value
    if isinstance(value, dict):
        if names := words.components(kind):
            yield from _of_component(place, names)
            return
        if model := words.model_of(kind):
            yield from _of_settings(place, model)
            return
        if (inner := words.value_of(kind)) is not None:
            for key in value:
                yield from _of(place.below(key, inner))
            return
    if isinstance(value, list) and words.element_of(kind, 0) is not None:
        inside = [
            mistake for index in range(len(value)) for mistake in _of(place.below(index, words.element_of(kind, index)))
        ]
        if inside:
            yield from inside
            return
    if not _fits(place):
        yield place.says(f"expected {words.expected(kind)}, found {found(place.node)}{_hint(place)}")


def _of_component(place: _Place, names: dict[str, type[Settings]]) -> Iterator[Mistake]:
    said = place.node.value.get("name")
    if said is None:
        yield place.node.where, f"{place.at('name')} is missing; there is: {', '.join(names)}"
    elif not isinstance(said.value, str) or said.value not in names:
        # What else is wrong with a component that does not exist says nothing.
        yield said.where, _no_such(place.dotted, said, names)
    else:
        yield from _of_settings(place, names[said.value])


def _of_settings(place: _Place, model: type[Settings]) -> Iterator[Mistake]:
    given, known = place.node.value, words.fields(model)
    inside: list[Mistake] = []
    meant = set()
    for key in given:
        if key not in known:
            inside.append((given[key].where, f"{place.at(key)} is not a key{suggestion(key, known)}"))
            meant.update(difflib.get_close_matches(key, known, n=1, cutoff=0.6))
    for key, field in known.items():
        if key in given:
            inside += _of(place.below(key, field.annotation, not field.is_required))
        elif field.is_required and key not in meant:  # else a mistyped key beside it tells of this one
            what = f"{place.at(key)} is missing; add {words.expected(field.annotation)}"
            inside.append((place.node.where, what))
    yield from inside or _of_the_whole(place, model)


def _of_the_whole(place: _Place, model: type[Settings]) -> Iterator[Mistake]:
    """What values that are right by themselves say together."""
    try:
        convert(place.node.plain(), model)
    except msgspec.ValidationError as error:
        cause = error.__cause__
        if not isinstance(cause, Unfit):
            yield place.says(str(cause or error))
            return
        for key, reason in cause.reasons.items():
            at = place.node.value[key].where if key in place.node.value else place.node.where
            yield at, f"{place.at(key)}: {reason}"


def _fits(place: _Place) -> bool:
    value = place.node.value
    if isinstance(value, float) and not math.isfinite(value):
        return False
    try:
        convert(place.node.plain(), place.annotation)
    except msgspec.ValidationError:
        return False
    return True


def _no_such(folder: str, node: Node, known: dict[str, type[Settings]]) -> str:
    if not isinstance(node.value, str):
        return f"{folder}.name: expected one of: {', '.join(known)}, found {found(node)}"
    meant = _that_speaks_of(node.value, known)
    near = f"; did you mean {meant!r}?" if meant else suggestion(node.value, known)
    return f"{folder}.name: there is no {folder} {found(node)}{near}"


def _that_speaks_of(word: str, known: dict[str, type[Settings]]) -> str | None:
    """The one component that has the word in its description, or among what it lets choose: `resnet` is `cnn`."""
    wanted = _letters(word)
    speak = []
    for name, component in known.items():
        fields = words.fields(component).values()
        said = [sys.modules[component.__module__].__doc__ or "", component.__doc__ or ""]
        said += [str(choice) for field in fields for choice in words.choices(field.annotation)]
        if any(_letters(one).startswith(wanted) for text in said for one in text.split()):
            speak.append(name)
    return speak[0] if len(speak) == 1 and len(wanted) >= NUM_LETTERS else None


def _letters(word: str) -> str:
    return re.sub(r"[\W_]", "", word.lower())


def _hint(place: _Place) -> str:
    """The next move, where more can be said than what was expected."""
    kind, node, value = place.annotation, place.node, place.node.value
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
