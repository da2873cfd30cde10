"""Carries what a process writes into its own folder of a run to the run's storage: every two seconds, and at the end.

Every file has one writer. What grows (events, metrics, logs) goes in pieces (`dtrain.runs.growing`), everything else
whole once it has stopped changing. What counts, the record and the list of checkpoints, changes on condition of the
lease only. What a script keeps as its own checkpoints has no such list: before each of these files is put or deleted it
is asked whose the run is.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from dtrain.errors import StorageError
from dtrain.runs.growing import Growing
from dtrain.storage import Conflict, Storage
from dtrain.storage.fencing import Fenced
from dtrain.storage.lease import GUARDED

PERIOD_S = 2.0
SLOW_PERIOD_S = 30.0
"""For files that are put whole and change all the time."""
LAST_S = 60.0
"""How long storage may refuse at the end before what was not carried is given up."""
NUM_AT_ONCE = 8
MAX_ECHO = 1 << 20


class Carrier:
    """A thread that carries a folder's files to storage until it is closed."""

    def __init__(
        self,
        storage: Storage,
        run_id: str,
        folder: Path,
        is_mine: Callable[[], bool],
        *,
        growing: Iterable[str] = (),
        whole: Iterable[str] = (),
        slow: Iterable[str] = (),
        mirrored: Iterable[str] = (),
        also: Callable[[], None] | None = None,
        echo: BinaryIO | None = None,
    ) -> None:
        """`growing` are names, the others patterns below `folder`.

        `whole` files are put once they have stopped changing, `slow` ones every half minute, and of `mirrored` ones
        those that are deleted are deleted on storage too. `also` is done each time round. `is_mine` says whether the
        run still belongs to whoever started this, and raises `StorageError` when nobody can tell. What logs gain is
        written to `echo` too.
        """
        self._storage, self._run_id, self._folder, self._is_mine = storage, run_id, folder, is_mine
        growing = list(growing)
        self._growing = [Growing(storage, f"{run_id}/{name}", folder / name) for name in growing]
        self._whole, self._slow, self._mirrored = list(whole), list(slow), list(mirrored)
        self._also, self._echo = also, echo
        self._logs = {folder / name: 0 for name in growing if name.endswith(".log")}
        self._seen: dict[str, tuple[int, int]] = {}
        self._carried: dict[str, tuple[int, int]] = {}
        self._next_slow = 0.0
        self._said = ""
        self._wake, self._ends = threading.Event(), False
        self._thread = threading.Thread(target=self._keep, name="dtrain-carrier", daemon=True)
        self.lost: str | None = None
        """Why nothing is carried any more: somebody else has the run."""

    def fetch(self) -> None:
        """Begin with what storage has of these files, so that what is written next stands behind it."""
        with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
            list(pool.map(Growing.pull, self._growing))
            for pattern in self._mirrored:
                prefix = f"{self._run_id}/{pattern.partition('*')[0]}"
                listed = [entry.name.removeprefix(f"{self._run_id}/") for entry in self._storage.entries(prefix)]
                found = {f"{self._run_id}/{name}": self._folder / name for name in listed if name not in GUARDED}
                for copy in found.values():
                    copy.parent.mkdir(parents=True, exist_ok=True)
                list(pool.map(self._storage.download, found.keys(), found.values()))
                self._carried |= {str(copy.relative_to(self._folder)): _facts(copy) for copy in found.values()}

    def start(self) -> None:
        self._logs = {path: path.stat().st_size if path.exists() else 0 for path in self._logs}
        self._thread.start()

    def hurry(self) -> None:
        """Something happened that people wait to see."""
        self._wake.set()

    def close(self) -> bool:
        """Carry what is left, and end; False when storage refused some of it until the last."""
        self._ends = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        deadline = time.monotonic() + LAST_S
        while self.lost is None and not self._once(is_last=True):
            if time.monotonic() >= deadline:
                return False
            time.sleep(1.0)
        return True

    def _keep(self) -> None:
        while not self._ends and self.lost is None:
            try:
                self._once()
            except Exception:  # a fault of ours must not keep a stop, or the record, from getting through later
                traceback.print_exc()
            self._wake.wait(PERIOD_S)
            self._wake.clear()

    def _once(self, is_last: bool = False) -> bool:
        """Carry all that is new; False when storage refused."""
        try:
            self._repeat_logs()
            if self._also is not None:
                self._also()
            for growing in self._growing:
                growing.push(self._is_mine)
            self._carry(self._whole, is_last)
            self._carry(self._mirrored, is_last, asks=True)
            self._delete(self._mirrored)
            if is_last or time.monotonic() >= self._next_slow:
                self._next_slow = time.monotonic() + SLOW_PERIOD_S
                self._carry(self._slow, True)
        except (Fenced, Conflict) as error:
            self.lost = error.message
            return True
        except StorageError as error:
            if error.message != self._said:
                self._said = error.message
                print(f"not carried to storage yet: {error.message}", file=sys.stderr, flush=True)
            return False
        return True

    def _repeat_logs(self) -> None:
        """Whole lines only, each with the name of the log that it stands in."""
        if self._echo is None:
            return
        for path, offset in self._logs.items():
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(offset)
                text = file.read(MAX_ECHO)
                # Of a line that is longer, as a bar of progress makes it, nobody waits for the end.
                whole = text if len(text) == MAX_ECHO and b"\n" not in text else text[: text.rfind(b"\n") + 1]
                self._logs[path] += len(whole)
                label = path.stem.encode() + b" | "
                self._echo.writelines(label + line + b"\n" for line in whole.splitlines())
        with contextlib.suppress(OSError):
            self._echo.flush()

    def _carry(self, patterns: list[str], at_once: bool, asks: bool = False) -> None:
        for pattern in patterns:
            for path in sorted(self._folder.glob(pattern)):
                name = str(path.relative_to(self._folder))
                if name in GUARDED:  # a script may call a file so
                    continue
                with contextlib.suppress(FileNotFoundError):
                    facts = _facts(path)
                    is_settled = at_once or self._seen.get(name) == facts
                    self._seen[name] = facts
                    if path.is_file() and is_settled and self._carried.get(name) != facts:
                        if asks:
                            self._check_mine()
                        self._storage.upload(path, f"{self._run_id}/{name}")
                        self._carried[name] = facts

    def _delete(self, patterns: list[str]) -> None:
        prefixes = tuple(pattern.partition("*")[0] for pattern in patterns)
        gone = [n for n in self._carried if n.startswith(prefixes) and not (self._folder / n).exists()]
        if not gone:
            return
        self._check_mine()
        self._storage.delete([f"{self._run_id}/{name}" for name in gone])
        for name in gone:
            del self._carried[name]

    def _check_mine(self) -> None:
        if not self._is_mine():
            raise Fenced(f"run {self._run_id} belongs to somebody else now")


def pod_output() -> BinaryIO | None:
    """What the pod that this process is in prints, so that its log shows more than how Ray started; None elsewhere."""
    if "KUBERNETES_SERVICE_HOST" not in os.environ:
        return None
    try:
        return open("/proc/1/fd/1", "ab")
    except OSError:
        return None


def _facts(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
