"""A run whose folder lives in a bucket, as somebody sees it who does not drive it.

What was looked at is copied to a folder of this process, refreshed by version, and gone with the process: so whatever
reads a run folder reads this one too.
"""

import atexit
import hashlib
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from dtrain.errors import StorageError
from dtrain.runs import lines
from dtrain.runs.folder import Run
from dtrain.runs.growing import Growing, file_of, grows
from dtrain.runs.record import Record
from dtrain.settings import to_json
from dtrain.storage import Conflict, NotThere, Storage
from dtrain.storage.fencing import Fenced
from dtrain.storage.lease import COMMITTED, Lease, is_owned

NUM_READERS = 32
FRESH_S = 5.0
"""For so long the record that a listing has read serves the first look at a run."""
PATIENCE_S = 3.0
"""How long a driver that has ended its run may take to give the lease up."""
CHECKPOINTS = "checkpoints/"
MARKS = ("manifest.json", "COMMITTED")
"""What is copied of checkpoints, unless one is fetched."""
_making = threading.Lock()


def _copies() -> Path:
    """One for the process: threads that ask for it first ask at once, and what each copies must lie in the same."""
    with _making:
        return _made()


@cache
def _made() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dtrain-seen-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def in_parallel(work: Callable[[Any], Any], over: Iterable[Any]) -> list[Any]:
    """`work` for each, many at a time; raises what the first of them raised."""
    things = list(over)
    if len(things) < 2:
        return [work(thing) for thing in things]
    with ThreadPoolExecutor(min(NUM_READERS, len(things))) as pool:
        return list(pool.map(work, things))


class RemoteRun(Run):
    """A run in a bucket. Only the holder of the lease writes its record, on condition of the version it has read."""

    poll_s = 1.0

    def __init__(self, storage: Storage, run_id: str) -> None:
        super().__init__(Path(run_id))
        self.storage = storage
        self._grown: dict[str, Growing] = {}
        self._versions: dict[str, str] = {}
        self._listed: dict[str, str] = {}
        self._owning: Lease | None = None
        self._just_read: tuple[float, Record] | None = None

    @property
    def path(self) -> Path:
        """The folder of copies; `refresh` brings what is wanted there."""
        folder = _copies() / hashlib.sha256(self.storage.uri.encode()).hexdigest()[:8] / self.id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def id(self) -> str:
        return self._path.name

    @property
    def where(self) -> str:
        return f"{self.storage.uri.rstrip('/')}/{self.id}"

    # -- copies --------------------------------------------------------------------------------------------

    def refresh(self, *names: str) -> None:
        in_parallel(lambda name: self._refresh_folder(name) if name.endswith("/") else self._refresh_file(name), names)

    def fetch_checkpoint(self, name: str) -> None:
        """Copy a whole checkpoint (`step-00000100`); its bytes are not checked. Raises `NotThere`."""
        stored = self._stored_checkpoints()
        if name not in stored:
            raise NotThere(f"{self.where}: checkpoint {name} was deleted meanwhile, as newer ones came; ask once more")
        folder = f"{self.id}/{CHECKPOINTS}{stored[name]}/"
        found = [entry.name for entry in self.storage.entries(folder)]
        copies = {file: self.checkpoints / name / file.removeprefix(folder) for file in found}
        (self.checkpoints / name).mkdir(parents=True, exist_ok=True)
        in_parallel(lambda found: self.storage.download(*found), copies.items())

    def _refresh_file(self, name: str) -> None:
        if grows(name):
            self._grown.setdefault(name, Growing(self.storage, f"{self.id}/{name}", self.path / name)).pull()
            return
        try:
            found = self.storage.read_if_changed(f"{self.id}/{name}", self._versions.get(name))
        except NotThere:
            self._versions.pop(name, None)
            (self.path / name).unlink(missing_ok=True)
            return
        if found is not None:
            data, self._versions[name] = found
            _put(self.path / name, data)

    def _refresh_folder(self, folder: str) -> None:
        if folder == CHECKPOINTS:
            self._refresh_checkpoints()
            return
        listed = {e.name.removeprefix(f"{self.id}/"): e.version for e in self.storage.entries(f"{self.id}/{folder}")}
        changed = {file_of(name)[0] for name, version in listed.items() if self._listed.get(name) != version}
        in_parallel(self._refresh_file, sorted(changed))
        self._listed |= listed

    def _refresh_checkpoints(self) -> None:
        """Manifests and markers of the checkpoints that count, under the names that they have in a run folder."""
        stored = self._stored_checkpoints()
        for copy in self.checkpoints.glob("step-*"):
            if copy.name not in stored:
                shutil.rmtree(copy, ignore_errors=True)
        wanted = [(name, folder, mark) for name, folder in stored.items() for mark in MARKS]
        gone = set()

        def get(name: str, folder: str, mark: str) -> None:
            if not (self.checkpoints / name / mark).exists():
                try:
                    _put(self.checkpoints / name / mark, self._read(f"{CHECKPOINTS}{folder}/{mark}"))
                except NotThere:  # the run's driver deleted it since, as newer ones came
                    gone.add(name)

        in_parallel(lambda found: get(*found), wanted)
        for name in gone:
            shutil.rmtree(self.checkpoints / name, ignore_errors=True)

    def _stored_checkpoints(self) -> dict[str, str]:
        """The checkpoints that count, and the folder of each."""
        try:
            found = json.loads(self._read(COMMITTED)).get("checkpoints", {})
        except NotThere:
            return {}
        return {f"step-{int(step):08d}": entry["folder"] for step, entry in sorted(found.items())}

    # -- the record ----------------------------------------------------------------------------------------

    def look(self) -> Record | StorageError:
        """Read the record for a listing; the first look at it after that is served by this one."""
        try:
            record = self._parsed(self._read("run.json"))
        except StorageError as error:
            return error
        self._just_read = time.monotonic(), record
        return record

    def stored_record(self) -> Record:
        listed, self._just_read = self._just_read, None
        if listed is not None and time.monotonic() - listed[0] < FRESH_S:
            return listed[1]
        return self._parsed(self._read("run.json"))

    def latest(self, record: Record) -> dict[str, Any]:
        return record.latest

    def update(self, **changes: Any) -> Record:
        data, version = self.storage.read(f"{self.id}/run.json")
        before = self._parsed(data)
        # A process may sleep between two lines: this one may have been succeeded since it owned the run.
        if self._owning is not None and before.token > self._owning.token:
            raise Fenced(f"run {self.id} belongs to a newer owner now ({before.token}; this was {self._owning.token})")
        after = replace(before, **changes)
        self.storage.write(f"{self.id}/run.json", to_json(after).encode(), if_version=version)
        if after.state != before.state:
            self.event("state", state=after.state, before=before.state, cause=after.cause)
        return after

    def clear_stop(self) -> None:
        self.storage.delete([f"{self.id}/stop"])

    # -- the lease -----------------------------------------------------------------------------------------

    def acquire(self, dead: Record | None = None) -> int:
        """Own the run for a moment, as a client does who requeues or ends it.

        Of the owner that wrote `dead` the lease is taken at once. There is no descriptor to hand on: -1.
        """
        succeeding = dead.token if dead is not None else None
        lease = Lease(self.storage, self.id, f"pid {os.getpid()} on {socket.gethostname()}")
        lease.acquire(PATIENCE_S, succeeding=succeeding, renews=False)
        self._owning = lease
        return -1

    def release(self) -> None:
        if self._owning is not None:
            self._owning.release()
            self._owning = None

    def is_owned(self) -> bool:
        return is_owned(self.storage, self.id)

    @property
    def is_mine(self) -> bool:
        return self._owning is not None

    # -- files ---------------------------------------------------------------------------------------------

    def _read(self, name: str) -> bytes:
        return self.storage.read(f"{self.id}/{name}")[0]

    def write(self, name: str, text: str) -> None:
        self.storage.write(f"{self.id}/{name}", text.encode())

    def _append(self, name: str, value: dict[str, Any]) -> None:
        """For the few lines that a client writes while it holds the lease."""
        for _ in range(3):
            self._refresh_file(name)
            lines.append(self.path / name, value)
            try:
                self._grown[name].push(lambda: False)
            except Conflict:
                self._grown.pop(name)
                (self.path / name).unlink()
            else:
                return


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(data)
    temporary.replace(path)
