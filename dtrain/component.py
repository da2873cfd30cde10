"""Finds the one file behind a name in a job or cluster file: `strategy: {name: ddp}` is `dtrain/strategies/ddp.py`.

Each extensible folder states its contract in its `__init__.py`. A component file declares its options in a
class named `Options` and imports torch or ray inside functions only, so that reading and planning need neither.
`dtrain.spec` and what lies above it (`plan`, `runs`) are made of these options: a component file imports them
inside functions or for type checking only.
"""

import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationInfo, create_model
from pydantic_core import PydanticKnownError, SchemaValidator, core_schema

from dtrain.errors import InputError

if TYPE_CHECKING:
    import ast

DECLARES_OPTIONS = re.compile(r"^class Options\b", re.MULTILINE)


class Options(BaseModel):
    """Base of every settings class: frozen, unknown keys refused, the sentence under a field is its help (`helps`)."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        populate_by_name=True,
        protected_namespaces=(),
        defer_build=True,  # most are only ever parts of another
    )


class Named(Options):
    """What a type checker knows of a chosen component: it has a name, and options of its own."""

    name: str


@dataclass(frozen=True)
class Says:
    """Beside a type in `Annotated`: how a message and the reference say what is expected, e.g. `a name of ...`."""

    phrase: str


@cache
def helps(options: type[Options]) -> dict[str, str]:
    """The sentences under the fields of a settings class, read from its source when somebody asks for them.

    pydantic would do it for every class it makes, which costs a command more than all else that it does.
    """
    import ast

    found: dict[str, str] = {}
    for cls in reversed(options.__mro__):
        classes = _classes(cls.__module__) if cls is not Options and issubclass(cls, Options) else {}
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


@cache
def names(folder: str) -> tuple[str, ...]:
    """Names of the components in `dtrain/<folder>/`, sorted: every file there that declares a class `Options`.

    The files are read, not imported: the helpers beside components may need torch, and may import this module.
    """
    files = [file for path in _paths(folder) for file in path.glob("[a-z]*.py")]
    return tuple(sorted(file.stem for file in files if _declares_options(file)))


@cache
def is_there(folder: str, name: str) -> bool:
    """Whether there is a component of that name; reads its file alone."""
    return name.isidentifier() and any(_declares_options(path / f"{name}.py") for path in _paths(folder))


def load(folder: str, name: str) -> ModuleType:
    """The module behind `name`, e.g. `load("strategies", "ddp")`.

    Raises `InputError` with the nearest name when there is no such component.
    """
    if not is_there(folder, name):
        raise InputError(f"there is no {name!r} in dtrain/{folder}/{suggestion(name, names(folder))}")
    return importlib.import_module(f"dtrain.{folder}.{name}")


def _paths(folder: str) -> list[Path]:
    return [Path(path) for path in importlib.import_module(f"dtrain.{folder}").__path__]


def _declares_options(file: Path) -> bool:
    try:
        return DECLARES_OPTIONS.search(file.read_text(encoding="utf-8")) is not None
    except FileNotFoundError:
        return False


def suggestion(word: str, known: Iterable[str]) -> str:
    """A half-sentence that helps after a mistyped word: `; did you mean 'x'?`, or the list of what there is."""
    import difflib

    candidates = list(known)
    near = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there is: {', '.join(sorted(candidates))}" if candidates else ""


@dataclass(frozen=True)
class Choice:
    """Beside `Any` in `Annotated`: a component of `folder`, whose `name` picks the options that may stand beside it.

    Only the one that is named is imported, and has its options made: a command reads one job, not all there could be.
    """

    folder: str

    @property
    def union(self) -> Any:
        """The type in full: what a schema lists and a message chooses from."""
        return _union(self.folder)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.with_info_plain_validator_function(self._chosen)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        return handler(TypeAdapter(self.union).core_schema)

    def _chosen(self, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, Options) and hasattr(value, "name"):
            return value
        name = value.get("name") if isinstance(value, dict) else None
        known = name if isinstance(name, str) and is_there(self.folder, name) else None
        if not isinstance(value, dict):
            raise PydanticKnownError("model_attributes_type")
        if "name" not in value:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'name'"})
        if known is None:
            listed = ", ".join(f"'{name}'" for name in names(self.folder))
            tags = {"discriminator": "'name'", "tag": str(name), "expected_tags": listed}
            raise PydanticKnownError("union_tag_invalid", tags)
        one = _validator(self.folder, known)
        if info.mode != "json":
            return one.validate_python(value)
        # What holds for the whole document holds for this part of it: see FROM_FILE.
        rules = info.context if info.context is not None else {}
        return one.validate_json(json.dumps(value), **rules)


FROM_FILE: dict[str, Any] = {"strict": True, "by_alias": True, "by_name": False}
"""How a file of a person's is validated; passed on to components as the context."""


def union(folder: str) -> Any:
    """The type of a setting that names a component: its `name` picks the options that may stand beside it."""
    return Annotated[Any, Choice(folder)]


@cache
def _union(folder: str) -> Any:
    members = [with_name(name, load(folder, name).Options) for name in names(folder)]
    if len(members) == 1:
        return members[0]
    return Annotated[Union[tuple(members)], Field(discriminator="name")]  # noqa: UP007 -- made at run time


@cache
def _validator(folder: str, name: str) -> SchemaValidator:
    """Of one component; it puts the name into the location of a mistake, as that of all of them would."""
    options = with_name(name, load(folder, name).Options)
    options.model_rebuild()  # it was put off, see `Options`
    schema = core_schema.tagged_union_schema({name: options.__pydantic_core_schema__}, discriminator="name")
    return SchemaValidator(schema)


@cache
def with_name(name: str, options: type[Options]) -> type[Options]:
    """`options` with the field `name: Literal[name]` that a file writes beside them."""
    doc = inspect.cleandoc(options.__doc__ or name)
    field: Any = (Literal[name], Field(default=name, description=doc.partition("\n")[0]))
    # Two folders may hold the same name: in a schema they are told apart by module.
    return create_model(name, __base__=options, __doc__=doc, __module__=options.__module__, name=field)
