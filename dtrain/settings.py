"""What every settings class is made of: typed, frozen, checked however it comes about, and the same in JSON.

Job and cluster files, a component's options, plans and run records are such classes. msgspec does the work.
"""

import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, dataclass_transform, get_args, get_type_hints

import msgspec
from msgspec import Meta, Struct, StructMeta

from dtrain.errors import StorageError

if TYPE_CHECKING:
    import ast

PositiveInt = Annotated[int, Meta(gt=0)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
Float = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
"""Any number but infinity, and what is none."""
PositiveFloat = Annotated[float, Meta(gt=0, le=sys.float_info.max)]
Made = TypeVar("Made")


class Checked(StructMeta):
    """Makes settings that are checked however they come about, and given by name."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **config: Any) -> Any:
        return super().__new__(mcs, name, bases, namespace, **{"kw_only": True, **config})

    if not TYPE_CHECKING:

        def __call__(cls, **values: Any) -> Any:
            in_files = dict(zip(cls.__struct_fields__, cls.__struct_encode_fields__, strict=True))
            return convert({in_files.get(name, name): value for name, value in values.items()}, cls)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(msgspec.field,))
class Settings(Struct, metaclass=Checked, frozen=True, forbid_unknown_fields=True):
    """Base of every settings class: frozen, unknown keys refused, the sentence under a field is its help (`helps`).

    A number of a file's has both bounds: without them infinity and what is no number would pass. What depends on
    several fields is checked in `__post_init__`, which raises `ValueError`, or `Unfit` for some of them.
    """


class Unfit(ValueError):
    """Values that do not go with the others of their class: why, by key."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__("; ".join(f"{key}: {reason}" for key, reason in reasons.items()))
        self.reasons = reasons


def convert(value: Any, kind: type[Made]) -> Made:
    """Mappings and lists as the settings they stand for. Raises `msgspec.ValidationError`."""
    return msgspec.convert(value, kind, dec_hook=_chosen)


def from_json(text: str | bytes, kind: type[Made]) -> Made:
    """What `to_json` wrote. Raises `msgspec.ValidationError`, or its base `DecodeError` for what is not JSON."""
    return msgspec.json.decode(text, type=kind, dec_hook=_chosen)


def from_kept(data: bytes, kind: type[Made], where: str) -> Made:
    """What `to_json` put aside at `where`. Raises `StorageError` for what is damaged, or another dtrain's."""
    try:
        return from_json(data, kind)
    except ValueError as error:  # not JSON, not UTF-8, or not these settings
        raise StorageError(f"{where} is damaged, or was written by another version of dtrain: {error}") from None


def all_but(name: str, settings: Settings) -> dict[str, Any]:
    """Settings as plain values, one of them left out."""
    return {key: value for key, value in to_builtins(settings).items() if key != name}


def to_json(value: Any) -> str:
    """Settings as JSON for people to read; keys as in files."""
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=_builtin), indent=2).decode()


def to_builtins(value: Any) -> Any:
    """Settings as mappings, lists and scalars; keys as in files."""
    return msgspec.to_builtins(value, enc_hook=_builtin)


def _builtin(value: Any) -> Any:
    """Numbers of numpy's, and what is derived from Python's own: they come with the metrics of a user's task."""
    if hasattr(value, "item"):
        return value.item()
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"a {type(value).__name__} is not a setting")


def default(kind: type[Settings], name: str) -> Any:
    """What a field has where nothing is given."""
    return next(field.default for field in msgspec.structs.fields(kind) if field.name == name)


@dataclass(frozen=True)
class Says:
    """Beside a type in `Annotated`: how a message and the reference say what is expected, e.g. `a name of ...`."""

    phrase: str


@cache
def helps(kind: type[Settings]) -> dict[str, str]:
    """The sentences under the fields of a settings class, read from its source when somebody asks for them."""
    import ast

    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        classes = _classes(cls.__module__) if cls is not Settings and issubclass(cls, Settings) else {}
        body = classes[cls.__qualname__].body if cls.__qualname__ in classes else []
        for field, under in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(under, ast.Expr):
                text = under.value.value if isinstance(under.value, ast.Constant) else None
                if isinstance(text, str):
                    found[field.target.id] = inspect.cleandoc(text)
    return found


@cache
def _classes(module: str) -> "dict[str, ast.ClassDef]":
    import ast

    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


class Choice(type):
    """Makes the type of a setting whose `name` picks what may stand beside it: see `one_of`, and `component.union`.

    Only the one that is named is looked for: a command reads one job, not all there could be.
    """

    _known: Callable[[], Iterable[str]]
    _find: Callable[[str], Any]

    def __new__(mcs, title: str, *_: Any) -> "Choice":
        return super().__new__(mcs, title, (), {})

    def __init__(cls, title: str, known: Callable[[], Iterable[str]], find: Callable[[str], Any]) -> None:
        super().__init__(title, (), {})
        cls._known, cls._find = known, find

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, Settings) and "name" in value.__struct_fields__

    @property
    def options(cls) -> dict[str, type[Settings]]:
        """Of every component that may be named, all of them imported: for messages and the reference."""
        return {name: cls._find(name) for name in cls._known()}

    def chosen(cls, value: Any) -> Any:
        """The component that a mapping names. Raises `ValueError`."""
        if cls.__instancecheck__(value):
            return value
        name = value.get("name") if isinstance(value, dict) else None
        options = cls._find(name) if isinstance(name, str) else None
        if options is None:
            raise ValueError(f"expected a mapping with `name`, one of: {', '.join(cls._known())}")
        return convert(value, options)


def _chosen(kind: Any, value: Any) -> Any:
    return kind.chosen(value)


def one_of(*kinds: type[Settings]) -> Any:
    """The type of a setting that is one of these, told apart by the one `name` that each of them may have."""
    by_name = {get_args(get_type_hints(each)["name"])[0]: each for each in kinds}
    return Choice("one_of", lambda: by_name, by_name.get)
