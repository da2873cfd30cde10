"""Checkpoints where several machines see them: folders of `dtrain.checkpoint.store`, carried to a `Storage` and back.

<run>/checkpoints/
  step-00000100-7-2/   of step 100, by the run's owner 7 in attempt 2: file for file what was written locally
  committed.json       the checkpoints there are: step, folder, SHA-256 of the manifest, size, loss

Shards first, the manifest after them, then the marker; last the line in `committed.json`, and only by it a checkpoint
exists. It is one document for all of them, as a store's condition on a write is about one object: an owner that was
believed dead cannot add a line to it (`dtrain.storage.fencing`), and so can neither commit nor delete what counts. No
two owners write below one folder.

Of a state sharded over nodes, each node puts its shards where they will stay; the first node joins the indexes.
"""

import contextlib
import hashlib
import json
import math
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dtrain.checkpoint import dcp_files, store
from dtrain.checkpoint.retention import Candidate, surplus
from dtrain.errors import StorageError
from dtrain.spec.job import Keep
from dtrain.storage import NotThere, Storage, fencing, lease

FOLDER = re.compile(r"step-(\d{8}|[1-9]\d{8,})-(\d+)-(\d+)$")
LINES = "checkpoints"
NUM_FILES_AT_ONCE = 4
"""The storage itself sends several parts of a file at once."""
POLL_S = 0.25

Files = dict[str, dict[str, Any]]
"""Size (`bytes`) and `sha256` of files, by name: as in a manifest."""


def steps(storage: Storage, run_id: str) -> list[int]:
    """Steps of all checkpoints that count, ascending; their bytes are not checked."""
    return sorted(_lines(storage, run_id))


def publish(storage: Storage, run_id: str, path: Path, token: int, attempt: int = 0) -> int:
    """Carry a checkpoint that `store.write` has committed to the storage, and commit it there; returns its bytes.

    Published again it is left as it is. Raises `Fenced` when a newer owner has the run, `StorageError` when storage
    refuses; then it does not exist there, and those before it are as they were.
    """
    manifest = store.read_manifest(path)
    text = (path / store.MANIFEST).read_bytes()
    step, files = int(manifest["step"]), dict(manifest["files"])
    folder = _folder(step, token, attempt)
    if _begin(storage, run_id, step, folder, token, text):
        _upload(storage, ((path / name, f"{_at(run_id, folder)}/{name}") for name in files))
        _commit(storage, run_id, folder, token, manifest, text)
    return _size(files)


def publish_part(storage: Storage, run_id: str, path: Path, step: int, node: int, token: int, attempt: int = 0) -> int:
    """Carry what one node holds of a checkpoint (`store.write_part`); returns its bytes. The first node commits it."""
    folder = _folder(step, token, attempt)
    _begin(storage, run_id, step, folder, token)
    sums: dcp_files.Sums = json.loads((path / store.MARKER).read_bytes())
    files, moves, at = Files(), [], _at(run_id, folder)
    for name in dcp_files.file_names(path):
        whole = dcp_files.name_in_whole(name, node)
        files[whole] = {"bytes": (path / name).stat().st_size, "sha256": sums[name]}
        moves.append((path / name, f"{at}/{whole}"))
    _upload(storage, [*moves, (path / dcp_files.INDEX, f"{at}/parts/{node}{dcp_files.INDEX}")])
    storage.write(f"{at}/parts/{node}.json", json.dumps(files, indent=2).encode())
    return _size(files)


def commit_parts(
    storage: Storage,
    run_id: str,
    step: int,
    num_nodes: int,
    token: int,
    attempt: int,
    facts: Mapping[str, Any],
    timeout_s: float = 600.0,
) -> int:
    """Make a checkpoint of the parts that all nodes carry there (this one too), and commit it; returns its bytes.

    Raises `StorageError` when a part does not come within `timeout_s` or they are not the whole state, `Fenced` when a
    newer owner has the run.
    """
    folder = _folder(step, token, attempt)
    at = _at(run_id, folder)
    _await_parts(storage, at, num_nodes, timeout_s)
    files = Files()
    with tempfile.TemporaryDirectory(prefix="dtrain-parts-") as made:
        parts = [Path(made, str(node)) for node in range(num_nodes)]
        for node, part in enumerate(parts):
            files |= json.loads(storage.read(f"{at}/parts/{node}.json")[0])
            storage.download(f"{at}/parts/{node}{dcp_files.INDEX}", part / dcp_files.INDEX)
        index = dcp_files.joined_index(parts)
    storage.write(f"{at}/{dcp_files.INDEX}", index)
    files[dcp_files.INDEX] = {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}
    manifest = {"step": step, "files": files, **facts}
    _commit(storage, run_id, folder, token, manifest, json.dumps(manifest, indent=2).encode())
    with contextlib.suppress(StorageError):  # it counts already, and they go when it goes
        storage.delete(f"{at}/parts/{node}{what}" for node in range(num_nodes) for what in (".json", dcp_files.INDEX))
    return _size(files)


def newest_valid(
    storage: Storage, run_id: str, rejected: Callable[[str], None], into: Path
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint, brought to the folder `into`, with its manifest, every byte checked there; None if none.

    `rejected` is told, in a sentence, of each newer one that is passed over and why. A valid copy that lies in `into`
    already is not brought again. Raises `StorageError` when storage does not answer: that says nothing against any.
    """
    lines = _lines(storage, run_id)
    for step in sorted(lines, reverse=True):
        path = store.path_of(into, step)
        reason = _bring(storage, run_id, path, lines[step])
        if not reason:
            return path, store.read_manifest(path)
        rejected(f"checkpoint {path.name}: {reason}; going back to the one before")
    return None


def prune(storage: Storage, run_id: str, keep: Keep, token: int) -> list[int]:
    """Delete what the retention rule lets go, and what was begun and can no longer be committed.

    Returns the steps of the committed ones deleted. Raises `Fenced` before it has deleted anything, `StorageError`.
    """
    there = {entry.name for entry in storage.entries(f"{run_id}/{LINES}/")}
    gone: dict[int, dict[str, Any]] = {}

    def changed(document: fencing.Document) -> fencing.Document | None:
        lines = _parse(document)
        whole = {
            step: line
            for step, line in lines.items()
            if {f"{_at(run_id, line['folder'])}/{name}" for name in (store.MARKER, store.MANIFEST)} <= there
        }
        gone.clear()
        gone.update({s: lines[s] for s in surplus([Candidate(s, line["loss"]) for s, line in whole.items()], keep)})
        return _document({step: line for step, line in lines.items() if step not in gone}) if gone else None

    kept = _parse(fencing.change(storage, f"{run_id}/{lease.COMMITTED}", token, changed))
    folders = {line["folder"] for line in kept.values()}
    committed = [_named(folder) for folder in folders]
    for folder in sorted({name.split("/")[2] for name in there} - folders):
        if not FOLDER.match(folder):
            continue
        step, owner, attempt = _named(folder)
        # Of this owner another may be on its way; a newer owner's are none of ours, an older one's can never count.
        is_left = any(o == owner and a >= attempt and s >= step for s, o, a in committed)
        if owner < token or (owner == token and is_left):
            _delete(storage, run_id, folder, there)
    return sorted(gone)


# -- parts of the above ----------------------------------------------------------------------------------------------


def _folder(step: int, token: int, attempt: int) -> str:
    return f"step-{step:08d}-{token}-{attempt}"


def _named(folder: str) -> tuple[int, int, int]:
    """Step, owner's token and attempt."""
    match = FOLDER.match(folder)
    assert match, folder
    return int(match[1]), int(match[2]), int(match[3])


def _at(run_id: str, folder: str) -> str:
    return f"{run_id}/{LINES}/{folder}"


def _size(files: Files) -> int:
    return sum(facts["bytes"] for facts in files.values())


def _lines(storage: Storage, run_id: str) -> dict[int, dict[str, Any]]:
    try:
        return _parse(fencing.read(storage, f"{run_id}/{lease.COMMITTED}"))
    except NotThere:
        return {}


def _parse(document: fencing.Document) -> dict[int, dict[str, Any]]:
    return {int(step): line for step, line in document.get(LINES, {}).items()}


def _document(lines: Mapping[int, dict[str, Any]]) -> fencing.Document:
    return {LINES: {str(step): lines[step] for step in sorted(lines)}}


def _begin(storage: Storage, run_id: str, step: int, folder: str, token: int, manifest: bytes = b"") -> bool:
    """False when this very checkpoint is committed. Another one in its folder does not count any more after this."""
    is_there = False

    def changed(document: fencing.Document) -> fencing.Document | None:
        nonlocal is_there
        lines = _parse(document)
        held = lines.get(step)
        is_there = held is not None and held["folder"] == folder and held["manifest"] == _sha256(manifest)
        if held is None or held["folder"] != folder or is_there:
            return None
        return _document({other: line for other, line in lines.items() if other != step})

    fencing.change(storage, f"{run_id}/{lease.COMMITTED}", token, changed)
    return not is_there


def _commit(storage: Storage, run_id: str, folder: str, token: int, manifest: Mapping[str, Any], text: bytes) -> None:
    """Manifest, marker, and the line that makes it count, of a checkpoint whose shards are there."""
    at, step = _at(run_id, folder), int(manifest["step"])
    reason = _differs(storage, at, manifest["files"])
    if reason:
        raise StorageError(f"{storage.uri}/{at}: {reason} after the upload; it was not committed")
    storage.write(f"{at}/{store.MANIFEST}", text)
    storage.write(f"{at}/{store.MARKER}", _sha256(text).encode())
    loss = (manifest.get("metrics") or {}).get("loss")
    line = {
        "folder": folder,
        "manifest": _sha256(text),
        "bytes": _size(manifest["files"]),
        "loss": loss if loss is not None and math.isfinite(loss) else None,
    }
    name = f"{run_id}/{lease.COMMITTED}"
    fencing.change(storage, name, token, lambda document: _document({**_parse(document), step: line}))


def _await_parts(storage: Storage, at: str, num_nodes: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    needed = {f"{at}/parts/{node}.json": node for node in range(num_nodes)}
    while missing := needed.keys() - {entry.name for entry in storage.entries(f"{at}/parts/")}:
        if time.monotonic() >= deadline:
            nodes = ", ".join(str(node) for node in sorted(needed[name] for name in missing))
            raise StorageError(f"{storage.uri}/{at}: node {nodes} did not bring its part within {timeout_s:.0f} s")
        time.sleep(POLL_S)


def _upload(storage: Storage, moves: Iterable[tuple[Path, str]]) -> None:
    with ThreadPoolExecutor(NUM_FILES_AT_ONCE, "dtrain-publish") as pool:
        for _ in pool.map(lambda move: storage.upload(*move), moves):
            pass


def _bring(storage: Storage, run_id: str, path: Path, line: Mapping[str, Any]) -> str:
    """Bring a checkpoint to `path`, valid; else say what is wrong with it. Raises `StorageError` for storage's sake."""
    at = _at(run_id, line["folder"])
    if (path / store.MARKER).is_file():
        try:
            store.verify(path)
            if _sha256((path / store.MANIFEST).read_bytes()) == line["manifest"]:
                return ""
        except (StorageError, OSError):
            pass  # a copy, and not the checkpoint: it is brought anew
    _remove(path)
    try:
        text, _ = storage.read(f"{at}/{store.MANIFEST}")
        if _sha256(text) != line["manifest"]:
            return f"{store.MANIFEST} is not the one that was committed"
        files: Files = json.loads(text)["files"]
        # Before anything large is brought in vain.
        if reason := _differs(storage, at, files):
            return reason
        with ThreadPoolExecutor(NUM_FILES_AT_ONCE, "dtrain-bring") as pool:
            for _ in pool.map(lambda name: storage.download(f"{at}/{name}", path / name), files):
                pass
    except NotThere as error:
        return f"{error.message.removeprefix(f'{storage.uri}/{at}/')} (it was deleted)"
    try:
        (path / store.MANIFEST).write_bytes(text)
        (path / store.MARKER).write_text(line["manifest"])
        store.verify(path)
    except StorageError as error:
        _remove(path)
        return error.message.removeprefix(f"{path.name}: ")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error
    return ""


def _differs(storage: Storage, at: str, files: Files) -> str:
    """What is not as a manifest says, as far as a listing shows; empty when all is."""
    sizes = {entry.name: entry.bytes for entry in storage.entries(f"{at}/")}
    for name, facts in files.items():
        found = sizes.get(f"{at}/{name}")
        if found is None:
            return f"{name} is missing"
        if found != facts["bytes"]:
            return f"{name} has {found} bytes instead of {facts['bytes']}"
    return ""


def _delete(storage: Storage, run_id: str, folder: str, there: set[str]) -> None:
    at = _at(run_id, folder)
    # The marker goes first: what is left of an interrupted deletion shall not look whole to anybody.
    storage.delete([f"{at}/{store.MARKER}"])
    storage.delete(name for name in there if name.startswith(f"{at}/"))


def _remove(path: Path) -> None:
    (path / store.MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
