"""The types of a schema in plain words: for messages, for the reference, and for finding what may stand at a place."""

import inspect
import types
from copy import copy
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from dtrain.component import Choice, Options, Says, helps

UNIONS = (Union, types.UnionType)


def key_of(name: str, field: FieldInfo) -> str:
    """What a file calls a field."""
    return field.alias or name


def fields(model: type[Options]) -> dict[str, FieldInfo]:
    """The keys a file may give at a place, and their fields with help; the name of a component comes first."""
    said = helps(model)
    found = {}
    for name, original in model.model_fields.items():
        field = copy(original)
        field.description = field.description or said.get(name)
        found[key_of(name, field)] = field
    return {"name": found.pop("name"), **found} if "name" in found else found


def annotation_of(field: FieldInfo) -> Any:
    """The whole type of a field, with the metadata that pydantic took off it."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union, or the type itself; what stands around them in `Annotated` is dropped."""
    if get_origin(annotation) is Annotated:
        for mark in get_args(annotation)[1:]:
            if isinstance(mark, Choice):
                return alternatives(mark.union)
    while get_origin(annotation) is Annotated and get_origin(get_args(annotation)[0]) in UNIONS:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in UNIONS:
        return [flat for member in get_args(annotation) for flat in alternatives(member)]
    return [annotation]


def bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def components(annotation: Any) -> dict[str, type[Options]]:
    """The components that a setting chooses from by `name`; empty for any other setting."""
    found: dict[str, type[Options]] = {}
    for member in alternatives(annotation):
        kind = bare(member)
        if kind is type(None):
            continue
        if not (inspect.isclass(kind) and issubclass(kind, Options) and "name" in kind.model_fields):
            return {}
        said = kind.model_fields["name"].annotation
        if get_origin(said) is not Literal or len(get_args(said)) != 1:
            return {}
        found[get_args(said)[0]] = kind
    return found


def model_of(annotation: Any) -> type[Options] | None:
    """The settings class at a place, when there is exactly one."""
    models = [k for k in map(bare, alternatives(annotation)) if inspect.isclass(k) and issubclass(k, Options)]
    return models[0] if len(models) == 1 else None


def element_of(annotation: Any, index: int) -> Any:
    """The type of one element of a list, None when the type holds no list."""
    for kind in map(bare, alternatives(annotation)):
        arguments = get_args(kind)
        if get_origin(kind) is list:
            return arguments[0]
        if get_origin(kind) is tuple:
            return arguments[0] if arguments[-1] is ... else arguments[min(index, len(arguments) - 1)]
    return None


def value_of(annotation: Any) -> Any:
    """The type of the values of a mapping with free keys, None when the type holds no such mapping."""
    for kind in map(bare, alternatives(annotation)):
        if get_origin(kind) is dict:
            return get_args(kind)[1]
    return None


def accepts(annotation: Any, kind: type) -> bool:
    """Whether values of this very type (`int`, `float`, `bool`, `str`, ...) may stand there; bounds aside."""
    for member in map(bare, alternatives(annotation)):
        if get_origin(member) is Literal:
            if any(type(choice) is kind for choice in get_args(member)):
                return True
        elif member is kind or (get_origin(member) or member) is kind:
            return True
    return False


def choices(annotation: Any) -> list[str]:
    """The words that may stand there."""
    members = map(bare, alternatives(annotation))
    return [str(c) for m in members if get_origin(m) is Literal for c in get_args(m) if isinstance(c, str)]


def expected(annotation: Any) -> str:
    """What may stand at a place: `a whole number greater than 0, or null`."""
    names = components(annotation)
    if names:
        return f"a mapping with `name`, one of: {', '.join(names)}"
    return ", or ".join(_expected(member) for member in alternatives(annotation))


def _expected(annotation: Any) -> str:
    metadata = _metadata(annotation)
    kind = bare(annotation)
    for mark in metadata:
        if isinstance(mark, Says):
            return mark.phrase
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is type(None):
        return "null"
    if kind is bool:
        return "true or false"
    if origin is Literal:
        listed = ", ".join(str(choice) for choice in arguments)
        return listed if len(arguments) == 1 else f"one of: {listed}"
    if kind is int:
        return f"a whole number{_bounds(metadata)}"
    if kind is float:
        return f"a number{_bounds(metadata)}"
    if kind is str:
        return f"text{_length(metadata, 'characters')}"
    if origin is tuple and arguments[-1] is not ...:
        if len(set(map(str, arguments))) == 1:
            return f"a list of {len(arguments)}, each {expected(arguments[0])}"
        return f"a list of {len(arguments)}: {'; '.join(map(expected, arguments))}"
    if origin in (list, tuple):
        return f"a list{_length(metadata, 'elements')}, each {expected(arguments[0])}"
    if origin is dict or kind is dict:
        return "a mapping"
    if inspect.isclass(kind) and issubclass(kind, Options):
        return f"a mapping of {', '.join(fields(kind))}"
    return "any value"


def _metadata(annotation: Any) -> list[Any]:
    if get_origin(annotation) is not Annotated:
        return []
    found: list[Any] = []
    for mark in get_args(annotation)[1:]:
        found += mark.metadata if isinstance(mark, FieldInfo) else [mark]
    return found


def _bounds(metadata: list[Any]) -> str:
    lower, upper = [], []
    for mark in metadata:
        if isinstance(mark, annotated_types.Gt):
            lower.append(f"greater than {_number(mark.gt)}")
        elif isinstance(mark, annotated_types.Ge):
            lower.append(f"at least {_number(mark.ge)}")
        elif isinstance(mark, annotated_types.Lt):
            upper.append(f"less than {_number(mark.lt)}")
        elif isinstance(mark, annotated_types.Le):
            upper.append(f"at most {_number(mark.le)}")
    said = lower + upper
    return f" {' and '.join(said)}" if said else ""


def _length(metadata: list[Any], of: str) -> str:
    said = []
    for mark in metadata:
        if isinstance(mark, annotated_types.MinLen) and mark.min_length:
            said.append("not empty" if mark.min_length == 1 else f"at least {mark.min_length} {of}")
        elif isinstance(mark, annotated_types.MaxLen):
            said.append(f"at most {mark.max_length} {of}")
        elif pattern := getattr(mark, "pattern", None):
            said.append(f"matching {pattern}")
    return f", {', '.join(said)}" if said else ""


def _number(bound: Any) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)
