"""Runs in a folder: of this machine, or one that several machines share (NFS, Lustre, a persistent volume).

An object is a file that is replaced whole: written beside its place, made durable, and renamed into it. Conditions are
judged under a lock on the hidden file `.lock`, which every replacing of a file takes for the moment of its rename;
among several machines that asks for a file system whose locks reach all of them, as those of NFS 4 do. What is there is
learned by opening it: of a path alone, NFS tells what it remembers.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from dtrain.errors import StorageError
from dtrain.storage import Conflict, Entry, NotThere, check_name, retrying

T = TypeVar("T")
LOCK = ".lock"
WRITING = ".writing-"
"""In the names of files that are not objects yet."""
TRANSIENT = {errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY}
"""What a shared file system answers while its server fails over."""
PATIENCE_S = 30.0


def open(place: str) -> "Folder":  # noqa: A001
    """The folder of that path; it need not exist yet."""
    return Folder(Path(os.path.abspath(os.path.expanduser(place.removeprefix("file://")))))


class Folder:
    """Runs in a folder (`dtrain.storage.Storage`)."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __repr__(self) -> str:
        return f"Folder({self.uri!r})"

    @property
    def uri(self) -> str:
        return str(self._root)

    @property
    def local(self) -> Path | None:
        return self._root

    def read(self, name: str) -> tuple[bytes, str]:
        path = self._path(name)

        def attempt() -> tuple[bytes, str]:
            with path.open("rb") as file:
                # Its version first: of a file that grows meanwhile, the next look shall see that it did.
                version = _version(os.fstat(file.fileno()))
                return file.read(), version

        return _doing(path, "read", attempt)

    def read_if_changed(self, name: str, version: str | None) -> tuple[bytes, str] | None:
        path = self._path(name)
        if version is not None and _doing(path, "read", lambda: _version_at(path)) == version:
            return None
        return self.read(name)

    def write(self, name: str, data: bytes, *, if_absent: bool = False, if_version: str | None = None) -> str:
        def fill(file: BinaryIO) -> None:
            file.write(data)

        def place(making: Path, path: Path) -> None:
            if if_absent:
                _link(making, path)
                return
            if if_version is not None:
                try:
                    found = _version_at(path)
                except (FileNotFoundError, NotADirectoryError):
                    found = None
                if found != if_version:
                    raise Conflict(f"{path} was {'written' if found else 'deleted'} by somebody else meanwhile")
            making.replace(path)

        return self._replace(self._path(name), fill, place)

    def upload(self, file: Path, name: str) -> None:
        try:
            source = file.open("rb")
        except OSError as error:
            raise StorageError(f"{file} cannot be read: {error.strerror or error}") from error

        def fill(target: BinaryIO) -> None:
            source.seek(0)
            shutil.copyfileobj(source, target, 1 << 20)

        with source:
            self._replace(self._path(name), fill)

    def download(self, name: str, file: Path) -> None:
        path = self._path(name)
        making = file.with_name(f".{file.name}{WRITING}{secrets.token_hex(4)}")

        def fill(source: BinaryIO) -> None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with making.open("xb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                making.replace(file)
            finally:
                making.unlink(missing_ok=True)

        def attempt() -> None:
            with path.open("rb") as source:
                _doing(file, "written", lambda: fill(source))

        _doing(path, "read", attempt)

    def entries(self, prefix: str = "") -> list[Entry]:
        folder = self._folder(prefix)
        return _doing(folder, "listed", lambda: sorted(self._walk(folder), key=lambda entry: entry.name))

    def folders(self, prefix: str = "") -> list[str]:
        folder = self._folder(prefix)

        def attempt() -> list[str]:
            try:
                found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
            except (FileNotFoundError, NotADirectoryError):
                return []
            return [name for name in found if next(self._walk(folder / name), None) is not None]

        return _doing(folder, "listed", attempt)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            path = self._path(name)
            _doing(path, "deleted", lambda path=path: path.unlink(missing_ok=True))  # type: ignore[misc]
            with contextlib.suppress(OSError):  # the folders that are empty by it, as a bucket has none
                for parent in path.parents:
                    if parent == self._root:
                        break
                    parent.rmdir()

    # -- parts of the above --------------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        return self._root / check_name(self.uri, name)

    def _folder(self, prefix: str) -> Path:
        assert not prefix or prefix.endswith("/"), prefix
        return self._path(prefix[:-1]) if prefix else self._root

    def _walk(self, folder: Path) -> Iterator[Entry]:
        """All objects below a folder, in any order; what vanishes meanwhile is left out."""
        for parent, _, files in os.walk(folder, onerror=_unless_gone):
            for file in files:
                path = Path(parent, file)
                if file == LOCK or WRITING in file:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    facts = path.stat()
                    yield Entry(path.relative_to(self._root).as_posix(), facts.st_size, _version(facts))

    def _replace(
        self,
        path: Path,
        fill: Callable[[BinaryIO], None],
        place: Callable[[Path, Path], object] = os.replace,
    ) -> str:
        """Make a file and put it in its place, whole; returns its version."""

        def attempt() -> str:
            making = path.with_name(f".{path.name}{WRITING}{secrets.token_hex(4)}")
            try:
                with self._made(making) as file:
                    fill(file)
                    file.flush()
                    # The kernel's own stamp is coarse: two versions may bear the same one, and an inode comes back.
                    now = time.time_ns()
                    os.utime(file.fileno(), ns=(now, now))
                    os.fsync(file.fileno())
                    version = _version(os.fstat(file.fileno()))
                with self._locked():
                    place(making, path)
            finally:
                making.unlink(missing_ok=True)
            _sync(path.parent)
            return version

        return _doing(path, "written", attempt)

    def _made(self, path: Path) -> BinaryIO:
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # its folder was empty, and somebody deleted it
                return path.open("xb")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            descriptor = os.open(self._root / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            descriptor = os.open(self._root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            with contextlib.suppress(PermissionError):  # another user was quicker
                os.fchmod(descriptor, 0o666)  # whoever may write beside it needs it too, whatever the umask
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _doing(path: Path, what: str, attempt: Callable[[], T]) -> T:
    """What `attempt` returns; its errors as ours, after further tries where they may help."""

    def tried() -> T:
        try:
            return attempt()
        except OSError as error:
            if error.errno in TRANSIENT:
                raise retrying.Again(error.strerror or str(error)) from error
            raise _said(path, what, error) from error

    try:
        return retrying.call(tried, PATIENCE_S)
    except retrying.Again as error:
        raise StorageError(f"{path} cannot be {what}: {error.reason}, for {PATIENCE_S:.0f} s") from error


def _said(path: Path, what: str, error: OSError) -> StorageError:
    if isinstance(error, FileNotFoundError) and what == "read":
        return NotThere(f"{path} does not exist")
    if isinstance(error, NotADirectoryError | IsADirectoryError) and what == "read":
        return NotThere(f"{path} is no file")
    reason = error.strerror or str(error)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"{path} cannot be {what}: {reason}; let {_me()} write there, or choose another storage")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{path} cannot be {what}: {reason}; free some, or choose another storage")
    return StorageError(f"{path} cannot be {what}: {reason}")


def _me() -> str:
    return f"user {os.geteuid()}"


def _version_at(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _version(os.fstat(descriptor))
    finally:
        os.close(descriptor)


def _link(making: Path, path: Path) -> None:
    """Put a file where none is. Raises `Conflict`."""
    try:
        os.link(making, path)
    except FileExistsError:
        raise Conflict(f"{path} is there already") from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if path.exists():  # a file system without links
            raise Conflict(f"{path} is there already") from None
        making.replace(path)


def _version(facts: os.stat_result) -> str:
    return f"{facts.st_mtime_ns:x}-{facts.st_size:x}-{facts.st_ino:x}"


def _sync(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # deleted since, with all that was in it
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
