"""`--set a.b=c`: one way to change what a file says. The value is YAML and is checked by the same schema."""

from collections.abc import Sequence

from dtrain.errors import InputError
from dtrain.spec.document import Node, found, parse

CLUSTER = "cluster."


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those for the job file, and those for the cluster file: the ones whose key begins with `cluster.`."""
    job = [text for text in overrides if not text.startswith(CLUSTER)]
    return job, [text for text in overrides if text.startswith(CLUSTER)]


def apply_overrides(root: Node, overrides: Sequence[str], *, prefix: str = "") -> None:
    """Change the document at `root`, in order; what is set is located as `--set a.b=c` from then on.

    `prefix` is taken off a key that begins with it. What cannot be applied is added to the root's mistakes.
    """
    for text in overrides:
        shown = text if len(text) <= 80 else f"{text[:77]}..."
        where = f"--set {shown if shown.isprintable() else ascii(shown)}"
        try:
            _apply(root, text, where, prefix)
        except InputError as error:
            root.mistakes.append((where, error.message.removeprefix(f"{where}: ")))


def _apply(root: Node, text: str, where: str, prefix: str) -> None:
    key, equals, written = text.partition("=")
    path = key.strip().removeprefix(prefix).split(".")
    if not equals or not all(path) or not key.isprintable():
        raise InputError("expected key=value with a dotted key, such as train.steps=100")
    value = parse(written, where, fixed_where=True) or Node(None, where)
    root.mistakes += value.mistakes
    place = root
    for depth, part in enumerate(path[:-1], start=1):
        if not isinstance(place.value, dict):
            break
        if part not in place.value or place.value[part].value is None:
            place.value[part] = Node({}, where)
        place = place.value[part]
        if not isinstance(place.value, dict):
            raise InputError(
                f"{'.'.join(path[:depth])} is {found(place)} at {place.where}, so it has no keys; set it as a whole"
            )
    place.value[path[-1]] = value
