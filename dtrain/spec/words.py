"""The types of a schema in plain words: for messages, for the reference, and for finding what may stand at a place."""

import inspect
import sys
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from msgspec import NODEFAULT, Meta, structs

from dtrain.settings import Choice, Says, Settings, helps

UNIONS = (Union, types.UnionType)


@dataclass(frozen=True)
class Key:
    """What a file may give at a place."""

    annotation: Any
    is_required: bool
    default: Any
    """None for one that is required."""
    help: str


def fields(model: type[Settings]) -> dict[str, Key]:
    """The keys a file may give at a place; the name of a component comes first."""
    said, found = helps(model), {}
    for field in structs.fields(model):
        default = field.default_factory() if field.default_factory is not NODEFAULT else field.default
        text = said.get(field.name, "")
        is_name = field.name == "name" and _only_choice(field.type) is not None
        if is_name and not text:
            text = (model.__doc__ or "").strip().partition("\n")[0]
        # The code may leave the name of a component out, a file may not.
        is_required = field.required or is_name
        found[field.encode_name] = Key(field.type, is_required, None if is_required else default, text)
    return {"name": found.pop("name"), **found} if "name" in found else found


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union, or the type itself; what stands around them in `Annotated` is dropped."""
    if isinstance(annotation, Choice):
        return list(annotation.options.values())
    while get_origin(annotation) is Annotated and get_origin(get_args(annotation)[0]) in UNIONS:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in UNIONS:
        return [flat for member in get_args(annotation) for flat in alternatives(member)]
    return [annotation]


def bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def components(annotation: Any) -> dict[str, type[Settings]]:
    """The components that a setting chooses from by `name`; empty for any other setting."""
    found: dict[str, type[Settings]] = {}
    for member in alternatives(annotation):
        kind = bare(member)
        if kind is type(None):
            continue
        name = _name_of(kind) if inspect.isclass(kind) and issubclass(kind, Settings) else None
        if name is None:
            return {}
        found[name] = kind
    return found


def _name_of(options: type[Settings]) -> str | None:
    """Of a component: the one that its `name` may have."""
    return next((_only_choice(field.type) for field in structs.fields(options) if field.name == "name"), None)


def _only_choice(annotation: Any) -> str | None:
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    return str(choices[0]) if len(choices) == 1 else None


def model_of(annotation: Any) -> type[Settings] | None:
    """The settings class at a place, when there is exactly one."""
    models = [k for k in map(bare, alternatives(annotation)) if inspect.isclass(k) and issubclass(k, Settings)]
    return models[0] if len(models) == 1 else None


def models(annotation: Any) -> list[type[Settings]]:
    """The settings classes that may stand at a place, or in a list or a mapping there."""
    found = []
    for kind in map(bare, alternatives(annotation)):
        if inspect.isclass(kind) and issubclass(kind, Settings):
            found.append(kind)
        elif kind is not Any and kind is not None and get_origin(kind) in (list, tuple, dict):
            found += [model for inner in get_args(kind) if inner is not ... for model in models(inner)]
    return found


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
    if inspect.isclass(kind) and issubclass(kind, Settings):
        return f"a mapping of {', '.join(fields(kind))}"
    return "any value"


def _metadata(annotation: Any) -> list[Any]:
    return list(get_args(annotation)[1:]) if get_origin(annotation) is Annotated else []


def _bounds(metadata: list[Any]) -> str:
    lower, upper = [], []
    for mark in metadata:
        if not isinstance(mark, Meta):
            continue
        if mark.gt is not None:
            lower.append(f"greater than {_number(mark.gt)}")
        if mark.ge is not None and mark.ge != -sys.float_info.max:
            lower.append(f"at least {_number(mark.ge)}")
        if mark.lt is not None:
            upper.append(f"less than {_number(mark.lt)}")
        if mark.le is not None and mark.le != sys.float_info.max:
            upper.append(f"at most {_number(mark.le)}")
    said = lower + upper
    return f" {' and '.join(said)}" if said else ""


def _length(metadata: list[Any], of: str) -> str:
    said = []
    for mark in metadata:
        if not isinstance(mark, Meta):
            continue
        if mark.min_length:
            said.append("not empty" if mark.min_length == 1 else f"at least {mark.min_length} {of}")
        if mark.max_length is not None:
            said.append(f"at most {mark.max_length} {of}")
        if mark.pattern is not None:
            said.append(f"matching {to_read(mark.pattern)}")
    return f", {', '.join(said)}" if said else ""


def to_read(pattern: str) -> str:
    """A pattern as editors and people know it: Python's end of a text is `\\Z`, its `$` allows a line end there."""
    return pattern.replace(r"\Z", "$")


def _number(bound: Any) -> str:
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"
