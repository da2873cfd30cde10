"""A file that is written past the page cache, and hashed as it is written.

A checkpoint is written once and hardly ever read: through the page cache it would cost a copy, push the training data
out of memory, and be read back for its sum. The sum of what was meant to be written is also the better witness.
"""

import errno
import fcntl
import hashlib
import mmap
import os
from pathlib import Path

BUFFER = 2**20
ALIGNMENT = 4096
"""Of addresses, offsets and lengths; what every file system asks for at most."""


class DirectFile:
    """A stream that can be written and told, as `torch.save` asks for; made durable by `os.fsync(file.fileno())`.

    Where the file system knows no direct access (tmpfs) it is written as any file is.
    """

    def __init__(self, path: Path) -> None:
        self._view = memoryview(mmap.mmap(-1, BUFFER))  # begins on a page
        self._filled = 0
        self._written = 0
        self._digest = hashlib.sha256()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT, 0o666)
            self._is_direct = True
        except OSError:
            path.unlink(missing_ok=True)  # some file systems refuse after they have made it
            self._descriptor = os.open(path, flags, 0o666)
            self._is_direct = False

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._filled = 0  # what went wrong need not go wrong again
        self.close()

    @property
    def sha256(self) -> str:
        """Of all that was written."""
        return self._digest.hexdigest()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Take `data`, of any length."""
        source = memoryview(data).cast("B")
        self._digest.update(source)
        done = 0
        while done < len(source):
            count = min(BUFFER - self._filled, len(source) - done)
            self._view[self._filled : self._filled + count] = source[done : done + count]
            self._filled += count
            done += count
            if self._filled == BUFFER:
                self._empty(BUFFER)
        return len(source)

    def tell(self) -> int:
        return self._written + self._filled

    def flush(self) -> None:
        """Nothing yet: a part of a block can be written only once, at the end."""

    def fileno(self) -> int:
        """The descriptor, all data written to it: after this nothing more is to be written."""
        whole = self._filled // ALIGNMENT * ALIGNMENT
        rest = bytes(self._view[whole : self._filled])
        if whole:
            self._empty(whole)
        if rest:
            self._leave_direct()
            self._view[: len(rest)] = rest
            self._empty(len(rest))
        self._filled = 0
        return self._descriptor

    def close(self) -> None:
        if self._descriptor >= 0:
            try:
                self.fileno()
            finally:
                os.close(self._descriptor)
                self._descriptor = -1

    def _empty(self, count: int) -> None:
        done = 0
        while done < count:
            try:
                done += os.write(self._descriptor, self._view[done:count])
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._leave_direct()  # promised and not kept, as by some network file systems
            if done % ALIGNMENT:
                self._leave_direct()  # the rest begins inside a block
        self._written += count
        self._filled = 0

    def _leave_direct(self) -> None:
        if self._is_direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self._is_direct = False
