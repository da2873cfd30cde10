"""How a user's own code gets to a cluster: one archive, named by what it holds, in the storage of the runs.

On the client `send` puts it there, before there is a run, and `record` writes into the run's folder what was sent; on
each node `arrive` fetches it, compares it with its name, and gives the plan with its paths changed. Where the storage
is a folder that the nodes see too, `settle` does that once for all. A job made of dtrain's own parts sends nothing.

    <storage>/code/<digest>.tar.gz     shared by all runs of the same code
    <storage>/<run>/code.json          which one a run uses, and the folder it came from
"""

import base64
import contextlib
import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dtrain import code
from dtrain.bundle import archive, files
from dtrain.bundle.rebase import REFERENCES, import_root, rebase
from dtrain.errors import ClusterError, InputError, StorageError
from dtrain.finding import Say
from dtrain.plan import AnyPlan
from dtrain.settings import Settings, from_kept, to_json
from dtrain.storage import Conflict, NotThere, Storage

__all__ = [
    "FOLDER",
    "MOUNTED",
    "RECORD",
    "Bundle",
    "Shipped",
    "arrive",
    "config_map_data",
    "fetch",
    "needed",
    "pack",
    "put",
    "rebase",
    "record",
    "send",
    "settle",
]

FOLDER = "code"
"""Beside the run folders; not a run."""
RECORD = "code.json"
MOUNTED = Path("/etc/dtrain/code")
"""Where a pod finds the archive when it came as a ConfigMap."""
LIMIT_BYTES = 100 * files.MB
TINY_BYTES = 700_000
"""What of a ConfigMap's 1 MiB an archive may take, in base64."""
MOST_NAMED = 5
P = TypeVar("P", bound=AnyPlan)


class Shipped(Settings):
    """What a run's folder says of the code that was sent for it."""

    digest: str
    """SHA-256 of the tree."""
    root: str
    """The client's folder, whose paths the plan has."""
    num_files: int
    total_bytes: int


@dataclass(frozen=True)
class Bundle:
    """A project, ready to be sent."""

    shipped: Shipped
    archive: bytes
    """A .tar.gz."""
    left_out: tuple[str, ...]
    """Files that git does not track and that are too large to be code."""

    @property
    def name(self) -> str:
        return _name(self.shipped.digest)


def _name(digest: str) -> str:
    return f"{FOLDER}/{digest}.tar.gz"


# -- on the client ---------------------------------------------------------------------------------------------


def needed(plan: AnyPlan) -> bool:
    """Whether a plan runs files of the user's own; installed packages are the image's affair."""
    return bool(_own(plan))


def pack(plan: AnyPlan, folder: Path | None = None, limit_bytes: int = LIMIT_BYTES) -> Bundle | None:
    """The project that a plan's own code lies in: its git repository, else the deepest folder with all that it names.

    `folder` is the job file's, where that is known: without git it is sent as well. None when nothing is needed.
    Raises `InputError` when the project is too large or holds what cannot be sent.
    """
    if not needed(plan):
        return None
    root, with_git = _project(plan, folder)
    try:
        found = files.belonging(root, with_git)
        _check_complete(plan, root, with_git, found)
        _check_size(root, found, limit_bytes)
        items = archive.read(root, found.files, found.links)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from None
    shipped = Shipped(
        digest=archive.digest(items), root=str(root), num_files=len(items), total_bytes=sum(len(i.data) for i in items)
    )
    large = tuple(f"{name} ({_size((root / name).stat().st_size)})" for name in found.large)
    return Bundle(shipped, archive.pack(items), large)


def put(storage: Storage, bundle: Bundle) -> None:
    """Put an archive where all runs of the same code find it, unless it is there. Raises `StorageError`."""
    if any(entry.name == bundle.name for entry in storage.entries(f"{FOLDER}/")):
        return
    with contextlib.suppress(Conflict):  # another submit of the same code was faster
        storage.write(bundle.name, bundle.archive, if_absent=True)


def config_map_data(bundle: Bundle) -> dict[str, str] | None:
    """The `binaryData` of a ConfigMap to mount at `MOUNTED`; None when the archive is too large for one."""
    encoded = base64.b64encode(bundle.archive).decode()
    return {f"{bundle.shipped.digest}.tar.gz": encoded} if len(encoded) <= TINY_BYTES else None


def send(storage: Storage, plan: AnyPlan, folder: Path | None = None, say: Say | None = None) -> Bundle | None:
    """Put what a plan needs of the user's own code into a storage; None when that is nothing.

    Raises `InputError` as `pack` does, and `StorageError`.
    """
    bundle = pack(plan, folder)
    if bundle is None:
        return None
    if say is not None:
        of = bundle.shipped
        say(f"sending {of.num_files} file{'s' * (of.num_files != 1)} of {of.root} ({_size(of.total_bytes)})")
        for name in bundle.left_out:
            say(
                f"not sent, for its size: {name}; put it where the cluster can read it, or keep it with"
                f" a line !{name.rpartition(' (')[0]} in {files.IGNORE_FILE}"
            )
    put(storage, bundle)
    return bundle


def record(storage: Storage, run_id: str, bundle: Bundle) -> None:
    """Write into a run's folder which code it uses. Raises `StorageError`."""
    storage.write(f"{run_id}/{RECORD}", to_json(bundle.shipped).encode())


def settle(storage: Storage, plan: P, bundle: Bundle) -> P:
    """Where the storage is a folder that the nodes see too: unpack what was sent there, once for all of them.

    Gives the plan with the paths that its files have there.
    """
    assert storage.local is not None
    root = fetch(storage, bundle.shipped.digest, storage.local / FOLDER)
    return _moved(plan, bundle.shipped, root)


# -- on the cluster --------------------------------------------------------------------------------------------


def fetch(storage: Storage, digest: str, folder: Path, mounted: Path | None = None) -> Path:
    """The unpacked archive of a digest, in a folder of its own below `folder`; whole, and what its name says.

    Several processes may call this at once. Raises `StorageError` when it is not there or not what was sent.
    """
    target = folder / digest[:16]
    if target.is_dir():
        return target
    packed = (mounted / f"{digest}.tar.gz") if mounted is not None else None
    if packed is not None and packed.is_file():
        contents, where = packed.read_bytes(), str(packed)
    else:
        where = f"{_name(digest)} in {storage.uri}"
        try:
            contents = storage.read(_name(digest))[0]
        except NotThere:
            raise StorageError(f"the code of this run is gone: there is no {where}; submit the job again") from None
    items = archive.open_verified(contents, digest, where)
    try:
        archive.write(items, target)
    except OSError as error:
        raise StorageError(f"the run's code cannot be unpacked to {target}: {error.strerror}") from None
    return target


def arrive(
    storage: Storage,
    run_id: str,
    plan: P,
    folder: Path,
    mounted: Path | None = MOUNTED,
    say: Say | None = None,
) -> P:
    """Bring a run's own code below `folder` of this node, and give the plan with the paths that its files have here.

    Raises `StorageError` when the code is not there or not what was sent, and `ClusterError` when a package that the
    job names is not installed here.
    """
    moved = plan
    try:
        found = storage.read(f"{run_id}/{RECORD}")[0]
    except NotThere:
        if lost := [file for file in _own(plan) if not os.path.exists(file)]:
            raise StorageError(
                f"{lost[0]} is not on this node, and {run_id} has no {RECORD} that says where its code is; submit again"
            ) from None
    else:
        shipped = from_kept(found, Shipped, f"{storage.uri}/{run_id}/{RECORD}")
        moved = _moved(plan, shipped, fetch(storage, shipped.digest, folder, mounted))
    _check_installed(plan, moved, say)
    return moved


def _moved(plan: P, shipped: Shipped, root: Path) -> P:
    return rebase(plan, shipped.root, str(root), lambda path: bool(glob.glob(path, recursive=True)))


def _check_installed(plan: AnyPlan, moved: AnyPlan, say: Say | None) -> None:
    """See that the packages a job names are here, and say where they are others than the plan was made with."""
    own = _own(plan)
    hashes = {known for file, known in plan.code.items() if file not in own}
    sent = dict.fromkeys(_own(moved), "")
    for reference, path in _references(moved):
        where, _ = code.split(reference)
        if code.is_file(where) or import_root(reference, sent) is not None:
            continue
        try:
            file = code.source_file(reference, Path(path))
        except InputError:
            raise ClusterError(
                f"this image has no module {where}, which the job names and the client has installed; install it in the"
                " image, or put it into the job's project and remove it from the client's packages"
            ) from None
        if file is not None and hashes and code.sha256(file) not in hashes and say is not None:
            say(f"{file} is not what {where} was when the job was submitted; it runs as it is here")


# -- both ------------------------------------------------------------------------------------------------------


def _own(plan: AnyPlan) -> list[str]:
    """The files that a plan names and no installed package holds."""
    return [file for file in plan.code if code.is_users(file)]


def _references(plan: AnyPlan) -> Iterator[tuple[str, str]]:
    """Each function of the user's own that a plan names, and the folder it is imported from first."""
    for options in (getattr(plan, "model", None), getattr(plan, "data", None)):
        for name in REFERENCES:
            reference: Any = getattr(options, name, None)
            if isinstance(reference, str):
                yield reference, str(getattr(options, "path", ""))


def _project(plan: AnyPlan, folder: Path | None) -> tuple[Path, bool]:
    """The folder to send, and whether git says what of it."""
    own = {file: plan.code[file] for file in _own(plan)}
    anchors = {os.path.dirname(file) for file in own}
    for reference, path in _references(plan):
        if code.is_file(code.split(reference)[0]):
            anchors.add(path)
        elif root := import_root(reference, own):
            anchors.add(root)
    if folder is not None:
        anchors.add(str(folder.absolute().resolve()))
    common = Path(os.path.commonpath(anchors))
    repository = files.repository(common)
    if repository is not None and not _is_too_broad(repository):
        return repository, True
    if _is_too_broad(common):
        raise InputError(
            f"the code of this job would be sent with all of {common}: {', '.join(sorted(anchors))} have no project in"
            " common; put the job and its code into one folder of their own, or install the code in the image"
        )
    return common, False


def _is_too_broad(folder: Path) -> bool:
    home = Path.home().resolve()
    return folder in (home, *home.parents) or len(folder.parts) < 2


def _check_complete(plan: AnyPlan, root: Path, with_git: bool, found: files.Found) -> None:
    sent = set(found.files)
    for file in _own(plan):
        name = os.path.relpath(file, root)
        if name in sent:
            continue
        if not os.path.exists(file):
            raise InputError(f"{file}, which the job names, is gone; put it back, or plan the job again")
        raise InputError(f"{file}, which the job names, would not be sent: {files.why_not(root, name, with_git)}")


def _check_size(root: Path, found: files.Found, limit_bytes: int) -> None:
    sizes = {name: (root / name).stat().st_size for name in found.files}
    total = sum(sizes.values())
    if total > limit_bytes:
        largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:MOST_NAMED]
        raise InputError(
            f"{root} would send {_size(total)}, and at most {_size(limit_bytes)} of code can be sent; the largest are"
            f" {', '.join(f'{name} ({_size(sizes[name])})' for name in largest)}; {files.advice(root)}, and put data"
            " where the cluster can read it"
        )


def _size(num_bytes: int) -> str:
    for unit, size in (("MB", files.MB), ("kB", 1000)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} B"
