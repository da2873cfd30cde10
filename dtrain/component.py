"""Finds the one file behind a name in a job or cluster file: `strategy: {name: ddp}` is `dtrain/strategies/ddp.py`.

Each extensible folder states its contract in its `__init__.py`. A component file declares its options in a
class named `Options` and imports torch or ray inside functions only, so that reading and planning need neither.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache
from types import ModuleType
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, create_model

from dtrain.errors import InputError


class Options(BaseModel):
    """Base of every settings class: frozen, unknown keys refused, the sentence under a field is its help."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
        populate_by_name=True,
        protected_namespaces=(),
    )


def names(folder: str) -> list[str]:
    """Names of the components in `dtrain/<folder>/`, sorted: every module there that is not private."""
    package = importlib.import_module(f"dtrain.{folder}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.ispkg and _is_component(folder, m.name))


def load(folder: str, name: str) -> ModuleType:
    """The module behind `name`, e.g. `load("strategies", "ddp")`.

    Raises `InputError` with the nearest name when there is no such component.
    """
    known = names(folder)
    if name not in known:
        raise InputError(f"there is no {name!r} in dtrain/{folder}/{suggestion(name, known)}")
    return importlib.import_module(f"dtrain.{folder}.{name}")


def suggestion(word: str, known: Iterable[str]) -> str:
    """A half-sentence that helps after a mistyped word: `; did you mean 'x'?`, or the list of what there is."""
    candidates = list(known)
    near = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there is: {', '.join(sorted(candidates))}" if candidates else ""


@cache
def union(folder: str) -> Any:
    """The type of a setting that names a component: its `name` picks the options that may stand beside it."""
    members = [with_name(name, load(folder, name).Options) for name in names(folder)]
    if len(members) == 1:
        return members[0]
    return Annotated[Union[tuple(members)], Field(discriminator="name")]


@cache
def with_name(name: str, options: type[Options]) -> type[Options]:
    """`options` with the field `name: Literal[name]` that a file writes beside them."""
    return create_model(name, __base__=options, __doc__=options.__doc__, name=(Literal[name], name))


@cache
def _is_component(folder: str, name: str) -> bool:
    return not name.startswith("_") and hasattr(importlib.import_module(f"dtrain.{folder}.{name}"), "Options")
