"""A plan for the machine it runs on: paths of a user's own code are moved from the client's folder to the fetched one.

Pure. What is moved: the files of `code` (their hashes stay, so that `code.changed` means the same), references to
functions and the folders they are imported from, data that was sent along, the script and the folder it is started in.
What is not: a script's arguments and environment and the `options` of a function of the user's own, which are theirs;
the storage; whatever lies outside the folder. Files of installed packages leave `code`: the image has its own.
"""

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, TypeVar

from msgspec.structs import replace

from dtrain import code
from dtrain.plan import AnyPlan, Plan, ScriptPlan
from dtrain.settings import Settings

P = TypeVar("P", bound=AnyPlan)
REFERENCES = ("build", "open", "transform")
"""Fields of models and data that name a function of the user's own; `path` beside them is where it is imported from."""


def _always(path: str) -> bool:
    del path
    return True


def rebase(plan: P, old_root: str, new_root: str, is_there: Callable[[str], bool] = _always) -> P:
    """The plan with what lies below `old_root` taken from `new_root`.

    `is_there` says of a moved path whether it came along: of data that did not, the plan keeps the old one; a script
    whose folder did not is started in `new_root`.
    """
    move = _Move(old_root, new_root, is_there)
    changes: dict[str, Any] = {
        "code": {move.path(file): known for file, known in plan.code.items() if move.moves(file)},
    }
    if isinstance(plan, Plan):
        changes |= {"model": move.options(plan.model, plan.code), "data": move.options(plan.data, plan.code)}
    if isinstance(plan, ScriptPlan):
        script = move.path(plan.entrypoint.script)
        changes |= {
            "entrypoint": replace(plan.entrypoint, script=script),
            "folder": folder if (folder := move.path(plan.folder)) != plan.folder and is_there(folder) else new_root,
        }
    return replace(plan, **changes)


def import_root(reference: str, files: dict[str, str]) -> str | None:
    """The folder from which the module of a reference is imported, known by its file among `files`."""
    where, _ = code.split(reference)
    if code.is_file(where):
        return None
    names = where.split(".")
    for file in files:
        parts = PurePosixPath(file).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if list(parts[-len(names) :]) == names:
            return str(PurePosixPath(*parts[: -len(names)]))
    return None


class _Move:
    def __init__(self, old_root: str, new_root: str, is_there: Callable[[str], bool]) -> None:
        self._old, self._new, self._is_there = old_root, new_root, is_there

    def moves(self, path: str) -> bool:
        return path == self._old or path.startswith(self._old.rstrip("/") + "/")

    def path(self, path: str) -> str:
        return self._new + path[len(self._old.rstrip("/")) :] if self.moves(path) else path

    def options(self, options: Any, files: dict[str, str]) -> Any:
        """A component's options; a module that the client imports from elsewhere than `path` is imported from there."""
        changes: dict[str, Any] = {}
        for name in type(options).__struct_fields__:
            before = getattr(options, name)
            after = self.path(before) if name in REFERENCES and isinstance(before, str) else self._value(before)
            if after != before:
                changes[name] = after
        reference = next((r for name in REFERENCES if (r := getattr(options, name, None))), None)
        if reference is not None:
            root = import_root(reference, files)
            changes["path"] = self.path(root if root is not None and self.moves(root) else options.path)
        return replace(options, **changes)

    def _value(self, value: Any) -> Any:
        """A declared setting; mappings are the user's own arguments."""
        if isinstance(value, Settings):
            return self.options(value, {})
        if isinstance(value, tuple):
            return tuple(self._value(one) for one in value)
        if isinstance(value, str) and self.moves(value) and self._is_there(self.path(value)):
            return self.path(value)
        return value
