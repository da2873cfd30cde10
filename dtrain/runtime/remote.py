"""Drive a run on any Ray cluster: started there, as a Ray job or in the head's pod, with the run's storage and id.

    python -m dtrain.runtime.remote --storage URI_OR_FOLDER --run ID [--address auto]

Where storage is a folder that every node sees, the run's folder is used as it is. Where it is a bucket, this process
and each node work in folders of their own that are carried there, and the run has an owner by a lease in the bucket.
Started again for a run that is under way it takes over: history, budget and newest checkpoint are on storage.
"""

import argparse
import contextlib
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from dtrain import handshake, storage
from dtrain.errors import ClusterError, DtrainError, StorageError
from dtrain.runs import Run, opened
from dtrain.runtime import driver, entry
from dtrain.runtime.carrier import Carrier, pod_output
from dtrain.runtime.joining import join
from dtrain.runtime.on_node import arrived_plan
from dtrain.runtime.own_folder import OwnFolder, base, make_base
from dtrain.storage import NotThere, Storage
from dtrain.storage.fencing import Fenced
from dtrain.storage.lease import Lease

TAKE_OVER_S = 120.0
"""Longest wait for the lease of a driver that was killed just now: it is believed dead after a period."""
UNGUARDED = (
    "{} ignores the conditions of writes (If-Match): should a driver that was believed dead wake up while another has"
    " the run, what both write at one moment may be mixed; update that store, or keep runs in another"
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Drive a run on this Ray cluster.")
    parser.add_argument("--storage", required=True, help="folder or URI that holds the runs")
    parser.add_argument("--run", required=True, help="the run's id")
    parser.add_argument("--address", default="auto", help="host:port of the Ray head, when it is not this cluster's")
    asked = parser.parse_args(argv)
    try:
        place = storage.at(asked.storage)
        if place.local is not None:
            run = Run(place.local / asked.run)
            handshake.check(place, run.id, _say)
            return _drive(run, asked.address, None)
        with OnHead(place, asked.storage, asked.run) as away:
            return _drive(away.run, asked.address, away)
    except DtrainError as error:
        print(error.message, file=sys.stderr)
        with contextlib.suppress(DtrainError):  # a run that a driver had before may yet go on elsewhere
            opened(asked.storage, asked.run).end_undriven("failed", error.message, error)
        return error.exit_code


def _drive(run: Run, address: str, away: "OnHead | None") -> int:
    make_base()
    folder = base() / "driver" if away is None else run.path
    folder.mkdir(mode=0o700, exist_ok=True)
    words = ["--run", str(run.path), "--folder", str(folder), "--placed", "--address", address]
    words += ["--lease", str(away.lock)] if away is not None else []
    arguments = entry.arguments_of(words)
    if not run.stored_record().ended:
        with _saying_to(run.logs / "driver.log"):
            ray = join(arguments, run.id, -1)
            arguments.address = ray.get_runtime_context().gcs_address
            driver.Driver(run, arguments, [], -1, away).drive(ray)
    record = run.stored_record()
    print(f"run {run.id}: {record.state}{f' ({record.cause})' if record.cause else ''}", flush=True)
    return ClusterError.exit_code if not record.ended else record.exit_code or 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _saying_to(log: Path) -> Iterator[None]:
    """Standard error goes to a log of the run; the job's own says how it began and ended."""
    sys.stderr.flush()
    before = os.dup(2)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)


class OnHead:
    """The driver's side of a run in a bucket: the lease, and a folder that is carried there."""

    def __init__(self, place: Storage, uri: str, run_id: str) -> None:
        self._place, self._uri, self._run_id = place, uri, run_id
        self._lease = Lease(place, run_id, f"pid {os.getpid()} on {socket.gethostname()}")
        self._record = b""
        self._said = ""

    def __enter__(self) -> "OnHead":
        where = f"{self._place.uri.rstrip('/')}/{self._run_id}"
        try:
            handshake.check(self._place, self._run_id, _say)
        except NotThere:
            raise StorageError(f"{where} is not there: nothing was submitted under this name") from None
        token = self._lease.acquire(TAKE_OVER_S)
        with contextlib.ExitStack() as undo:  # whoever ends the run because this failed must find it free
            undo.callback(self._lease.release)
            self._own = OwnFolder(self._run_id, token, "driver")
            undo.callback(self._own.remove)
            self._prepare(token)
            undo.pop_all()
        return self

    def _prepare(self, token: int) -> None:
        plan = arrived_plan(self._place, self._run_id)
        self.run = Run(self._own.path)
        self.run.write("plan.json", plan.to_json())
        self._record = self._place.read(f"{self._run_id}/run.json")[0]
        self.run.write("run.json", self._record.decode())
        self.agent_args: dict[str, Any] = {"storage": self._uri, "run": self._run_id, "token": token}
        growing = ["events.jsonl", "logs/driver.log"]
        self._carrier = Carrier(
            self._place,
            self._run_id,
            self._own.path,
            self._is_mine,
            growing=growing,
            also=self._exchange,
            echo=pod_output(),
        )
        self._carrier.fetch()
        if not self._lease.is_guarded and all(event["event"] != "unguarded" for event in self.run.events()):
            message = UNGUARDED.format(self._place.uri)
            self.run.event("unguarded", message=message)
            _say(message)
        self._carrier.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_carried = self._carrier.close()
        self._lease.release()
        self._own.remove()
        if not is_carried and kind is None:
            raise StorageError(
                f"how run {self._run_id} ended could not be written to {self._place.uri}; once it can be,"
                f" `dtrain resume {self._run_id}` goes on from the newest checkpoint"
            )

    @property
    def lock(self) -> int:
        return self._own.lock

    def hurry(self) -> None:
        self._carrier.hurry()

    def leave_if_lost(self) -> None:
        """Nothing is tidied in the run: it is somebody else's. What Ray runs for this process ends with it."""
        try:
            self._lease.check()
        except Fenced as error:
            self._leave(error.message)
        except StorageError as error:
            if not self._said:
                self._said = error.message
                print(error.message, file=sys.stderr)
        if self._carrier.lost is not None:
            self._leave(self._carrier.lost)

    def _leave(self, why: str) -> NoReturn:
        print(f"leaving run {self._run_id}: {why}", flush=True)
        self._own.remove()
        os._exit(ClusterError.exit_code)

    def _exchange(self) -> None:
        """Put the record on storage, and see whether somebody asked the run to stop."""
        record = (self.run.path / "run.json").read_bytes()
        if record != self._record:
            self._lease.fenced_write("run.json", record)
            self._record = record
        with contextlib.suppress(NotThere):
            self.run.write("stop", self._place.read(f"{self._run_id}/stop")[0].decode())

    def _is_mine(self) -> bool:
        try:
            self._lease.renew()
        except Fenced:
            return False
        return True


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Ray's own shutdown takes a second, and longer when its head is gone
