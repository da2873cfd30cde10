"""Documents that only the newest owner of a run may change, however long an older one has slept.

Such a document is a JSON object that says in `token` who wrote it. It is changed by reading it, refusing when a newer
owner has written it, and writing it back on condition that nobody has in between. Whoever takes a run over changes all
of them first (`dtrain.storage.lease`): from then on whatever an older owner still sends finds another version there, or
a newer token. A store without conditional writes leaves a gap between the two, as long as one request takes.
"""

import json
import random
import time
from collections.abc import Callable
from typing import Any

from dtrain.errors import StorageError
from dtrain.storage import Conflict, NotThere, Storage

Document = dict[str, Any]
TOKEN = "token"  # noqa: S105
NUM_TRIES = 20
"""Writers of one document are few and quick: more conflicts than this are no contention."""


class Fenced(StorageError):
    """A newer owner has the run: whoever is told this stops, and writes nothing more."""


def read(storage: Storage, name: str) -> Document:
    """A document with its token. Raises `NotThere`."""
    return _parse(storage, name, storage.read(name)[0])


def change(
    storage: Storage,
    name: str,
    token: int,
    changed: Callable[[Document], Document | None],
    *,
    makes: bool = True,
) -> Document:
    """Change a document as the owner with `token`; returns it as it then stands, without its token.

    `changed` gets the document without its token (empty when there is none) and returns what it shall be, or None to
    leave it alone; it may be asked again. Without `makes` a document that is not there is left so. Raises `Fenced`
    when a newer owner has written it.
    """
    for _ in range(NUM_TRIES):
        before: Document
        version: str | None
        try:
            data, version = storage.read(name)
            before = _parse(storage, name, data)
        except NotThere:
            if not makes:
                return {}
            before, version = {}, None
        found = before.pop(TOKEN, 0)
        if found > token:
            raise Fenced(
                f"{storage.uri}/{name} was written by a newer owner of the run ({found}; this one was {token})"
            )
        after = changed(dict(before))
        if after is None:
            return before
        text = json.dumps({TOKEN: token, **{key: after[key] for key in after if key != TOKEN}}, indent=2)
        try:
            storage.write(name, text.encode(), if_absent=version is None, if_version=version)
        except Conflict:
            time.sleep(random.uniform(0, 0.05))  # noqa: S311
            continue
        return after
    raise StorageError(f"{storage.uri}/{name}: somebody else wrote it each time, {NUM_TRIES} times in a row")


def _parse(storage: Storage, name: str, data: bytes) -> Document:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not isinstance(value.get(TOKEN, 0), int):
        raise StorageError(f"{storage.uri}/{name} is damaged: not a JSON object with a whole number as its {TOKEN}")
    return value
