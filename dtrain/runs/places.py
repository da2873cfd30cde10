"""The runs of a storage: making one, listing them all, finding the one that is meant."""

import hashlib
import secrets
import shutil
import time
from collections.abc import Collection
from pathlib import Path

from dtrain.component import suggestion
from dtrain.errors import InputError, StorageError
from dtrain.plan import AnyPlan
from dtrain.runs.folder import Run
from dtrain.runs.record import Record
from dtrain.settings import to_json
from dtrain.storage import Conflict, Storage, at, is_remote

ID_ALPHABET = "23456789abcdefghjkmnpqrstuvwxyz"


def new_name(plan: AnyPlan) -> str:
    """A name for a run of this plan that no run under its storage has at the moment; a bucket is not asked."""
    for _ in range(100):
        name = f"{plan.name}-{''.join(secrets.choice(ID_ALPHABET) for _ in range(4))}"
        if is_remote(plan.storage) or not (Path(plan.storage) / name).exists():
            return name
    raise StorageError(f"{plan.storage}: no free name for a run of {plan.name!r} in 100 tries")


def example_name(plan: AnyPlan) -> str:
    """A name for what is only shown: the same for the same plan, so that two dry runs can be compared."""
    digest = hashlib.sha256(plan.to_json().encode()).digest()
    return f"{plan.name}-{''.join(ID_ALPHABET[byte % len(ID_ALPHABET)] for byte in digest[:4])}"


def create(plan: AnyPlan, job_text: str, name: str | None = None) -> Run:
    """Make the folder of a new run under the plan's storage. Raises `StorageError` when that cannot be written."""
    name = name or new_name(plan)
    record = Record(
        id=name,
        name=plan.name,
        created_at=time.time(),
        num_steps=plan.num_steps,
        num_workers=plan.workers.total,
        cause="submitted",
    )
    files = {"job.yaml": job_text, "plan.json": plan.to_json(), "run.json": to_json(record)}
    run = _create_away(plan, name, files) if is_remote(plan.storage) else _create_here(plan, name, files)
    run.event("state", state="queued", before=None, cause="submitted")
    return run


def _create_here(plan: AnyPlan, name: str, files: dict[str, str]) -> Run:
    storage = Path(plan.storage)
    run = Run(storage / name)
    try:
        run.path.mkdir(parents=True)
        for folder in (run.logs, run.checkpoints, run.tensorboard):
            folder.mkdir()
        for file, text in files.items():
            run.write(file, text)
    except (OSError, StorageError) as error:
        if not isinstance(error, FileExistsError):
            shutil.rmtree(run.path, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else error.message
        raise StorageError(
            f"{storage}: the run folder cannot be written ({reason});"
            " choose another place with --set cluster.storage=FOLDER"
        ) from error
    return run


def _create_away(plan: AnyPlan, name: str, files: dict[str, str]) -> Run:
    from dtrain.runs.away import RemoteRun

    storage = at(plan.storage)
    run = RemoteRun(storage, name)
    try:
        for file, text in files.items():  # the record last: with it the run is there, and whole
            storage.write(f"{name}/{file}", text.encode(), if_absent=True)
    except Conflict:
        raise StorageError(f"{run.where} is there already; submit again for another name") from None
    return run


def opened(place: str | Path, run_id: str) -> Run:
    """The run of this id in a storage, whether or not there is one."""
    if not is_remote(str(place)):
        return Run(Path(place).absolute() / run_id)
    from dtrain.runs.away import RemoteRun

    return RemoteRun(at(str(place)), run_id)


def list_runs(place: str | Path, but: Collection[str] = ()) -> list[Run]:
    """All runs under a folder or URI, the oldest first; those whose record cannot be read before all others.

    Those named in `but` are not even looked at.
    """
    if is_remote(str(place)):
        return _listed(at(str(place)), but)
    folder = Path(place)
    if not folder.is_dir():
        return []
    found = [Run(p) for p in folder.absolute().iterdir() if p.name not in but and (p / "run.json").is_file()]
    return sorted(found, key=lambda run: (_created_at(run), run.id))


def _listed(storage: Storage, but: Collection[str]) -> list[Run]:
    """One listing, and a look at every record, many at a time."""
    from dtrain.runs.away import RemoteRun, in_parallel
    from dtrain.storage import NotThere

    found = [RemoteRun(storage, name) for name in storage.folders() if name not in but]
    looks = in_parallel(RemoteRun.look, found)
    runs = [(run, look) for run, look in zip(found, looks, strict=True) if not isinstance(look, NotThere)]
    order = {run.id: look.created_at if isinstance(look, Record) else float("-inf") for run, look in runs}
    return sorted((run for run, _ in runs), key=lambda run: (order[run.id], run.id))


def _created_at(run: Run) -> float:
    try:
        return run.stored_record().created_at
    except StorageError:
        return float("-inf")


def find(place: str | Path, word: str | None) -> Run:
    """The run that `word` means: a folder, a URI, a whole id, or the start of an id or of its last part.

    The latest for None. Raises `InputError` when there is none, or more than one.
    """
    if word and is_remote(word):
        place, _, word = word.rstrip("/").rpartition("/")
    elif word and (Path(word) / "run.json").is_file():
        return Run(Path(word).resolve())
    runs = list_runs(place)
    if not runs:
        raise InputError(f"{place}: there are no runs here yet; `dtrain submit JOB` makes one")
    if word is None:
        return runs[-1]
    exact = [r for r in runs if r.id == word]
    matches = exact or [r for r in runs if r.id.startswith(word) or r.id.rsplit("-", 1)[-1].startswith(word)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise InputError(f"{word!r} could be {', '.join(r.id for r in matches)}; type a little more")
    raise InputError(f"{place}: no run is called {word!r}{suggestion(word, [r.id for r in runs])}")


def delete(run: Run) -> None:
    """Remove a run's folder. Raises `StorageError` while somebody owns it."""
    run.acquire()
    shutil.rmtree(run.path)
