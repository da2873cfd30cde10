"""A user's own code: found and looked at while planning, without running it; imported by workers alone.

A function is named `./task.py:build`, in a file, or `my_package.my_task:build`, in a module that can be imported.
"""

import ast
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dtrain.component import suggestion
from dtrain.errors import InputError, TrainingError

EXPECTED = "FILE.py:FUNCTION, or MODULE:FUNCTION"


def split(reference: str) -> tuple[str, str]:
    """(file or module, function) of a reference. Raises `InputError` for one that is neither form."""
    where, _, name = reference.rpartition(":")
    if not where or not name.isidentifier() or not (is_file(where) or where.replace(".", "").isidentifier()):
        raise InputError(f"expected {EXPECTED}, found {reference!r}")
    return where, name


def is_file(where: str) -> bool:
    """Whether the part before the colon names a file rather than a module."""
    return where.endswith(".py") or "/" in where


def resolve(reference: str, folder: Path) -> str:
    """The reference with a relative path of its file taken from `folder`. Raises `InputError`."""
    where, name = split(reference)
    return f"{absolute(where, folder)}:{name}" if is_file(where) else reference


def absolute(path: str, folder: Path) -> Path:
    return (folder.absolute() / Path(path).expanduser()).resolve()


def source_file(reference: str, folder: Path) -> Path | None:
    """The file behind a resolved reference; None for a module that has no Python source.

    `folder` is searched before the import path. Nothing is run: not even the packages a module lies in.
    Raises `InputError` when there is no such file or module.
    """
    where, _ = split(reference)
    if is_file(where):
        if not Path(where).is_file():
            raise InputError(f"there is no file {where}; relative paths start at the job file's folder")
        return Path(where)
    search: list[str] | None = [str(folder), *sys.path]
    origin = None
    for depth, _part in enumerate(names := where.split("."), start=1):
        spec = _find(".".join(names[:depth]), search)
        if spec is None:
            raise InputError(
                f"there is no module {'.'.join(names[:depth])} in {folder} nor among the installed ones;"
                f" a file is named with its path: ./{names[-1]}.py:{reference.rpartition(':')[2]}"
            )
        origin, search = spec.origin, list(spec.submodule_search_locations or [])
    return Path(origin) if origin and origin.endswith(".py") else None


def _find(name: str, search: list[str] | None) -> Any:
    for finder in sys.meta_path:
        spec = finder.find_spec(name, search)
        if spec is not None:
            return spec
    return None


def check_syntax(path: Path) -> ast.Module:
    """What a file says, parsed. Raises `InputError` with its line where it is not Python, or cannot be read."""
    try:
        return ast.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        said = error.msg if isinstance(error, SyntaxError) else error
        raise InputError(f"{path}{line}: {said}; `python {path.name}` shows the place") from None


def check_call(reference: str, path: Path, positional: Iterable[str], options: Mapping[str, Any]) -> None:
    """See that a file has the function, and that the function takes what it will be given, as far as one can see.

    Raises `InputError` when it has not or does not. A class, or a function made by other code, is not looked into.
    """
    _, name = split(reference)
    tree = check_syntax(path)
    known = dict(_top_level(tree.body))
    if name not in known:
        if "*" in known:
            return
        raise InputError(f"{path} has no {name!r} at its top level{suggestion(name, known)}")
    found = known[name]
    if isinstance(found, ast.FunctionDef) and not found.decorator_list:
        _check_arguments(f"{path}:{found.lineno}: {name}", found.args, list(positional), options)


def _check_arguments(where: str, arguments: ast.arguments, positional: list[str], options: Mapping[str, Any]) -> None:
    ordered = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    called = f"it is called with ({', '.join([*positional, '**options'])})"
    if len(ordered) < len(positional) and arguments.vararg is None:
        raise InputError(f"{where} takes {len(ordered)} arguments by position; {called}")
    by_name = [*ordered[len(positional) :], *(a.arg for a in arguments.kwonlyargs)]
    unknown = [option for option in options if option not in by_name]
    if unknown and arguments.kwarg is None:
        near = suggestion(unknown[0], by_name) or "; it takes no options"
        raise InputError(f"{where} takes no option {unknown[0]!r}{near}")
    num_defaults = min(len(arguments.defaults), len(ordered[len(positional) :]))
    needed = ordered[len(positional) : len(ordered) - num_defaults]
    needed += [a.arg for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is None]
    missing = [option for option in needed if option not in options]
    if missing:
        raise InputError(f"{where} needs the option {missing[0]!r}; give it under `options`, or a default in the code")


def _top_level(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Every name that a module binds, and where; `*` for all that another module may bring."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name, statement
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            for alias in statement.names:
                yield alias.asname or alias.name.partition(".")[0], statement
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
                for node in ast.walk(target):
                    if isinstance(node, ast.Name):
                        yield node.id, statement
        else:
            for block in ("body", "handlers", "orelse", "finalbody"):
                for inner in getattr(statement, block, []):
                    yield from _top_level(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def sha256(path: Path) -> str:
    """Content hash of a file; empty when it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def changed(code: Mapping[str, str]) -> list[str]:
    """Files of a plan's `code` that are not what they were when it was made."""
    return [path for path, before in code.items() if sha256(Path(path)) != before]


# -- on a worker -----------------------------------------------------------------------------------------------


def load(reference: str, folder: str) -> Callable[..., Any]:
    """Import what a resolved reference names; `folder` goes first on the import path.

    Raises `TrainingError` with file and line when the user's code cannot be imported; its own error is the cause.
    """
    where, name = split(reference)
    for first in (folder, str(Path(where).parent) if is_file(where) else folder):
        if first in sys.path:
            sys.path.remove(first)
        sys.path.insert(0, first)
    try:
        module = _import_file(Path(where)) if is_file(where) else importlib.import_module(where)
    except (Exception, SystemExit) as error:
        at = place_of(error, where)
        raise TrainingError(f"{at}: {where} cannot be imported: {type(error).__name__}: {error}") from error
    try:
        function: Callable[..., Any] = getattr(module, name)
    except AttributeError:
        raise TrainingError(f"{where} has no {name!r}{suggestion(name, vars(module))}") from None
    return function


def _import_file(path: Path) -> ModuleType:
    """Import one file as a module named like it, once."""
    name = path.stem
    taken = sys.modules.get(name)
    if taken is not None and getattr(taken, "__file__", None) == str(path):
        return taken
    if taken is not None:
        name = f"{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def place_of(error: BaseException, default: str) -> str:
    """`file:line` of an error in a user's code: the innermost line that is neither a library's nor Python's own."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else default


def is_users(filename: str) -> bool:
    """Whether a line of a traceback is in a user's own code."""
    own = f"{Path(__file__).resolve().parent}/"
    library = f"{Path(traceback.__file__).resolve().parent}/"
    installed = ("/site-packages/", "/dist-packages/")
    return not (filename.startswith((own, library, "<frozen ")) or any(folder in filename for folder in installed))
