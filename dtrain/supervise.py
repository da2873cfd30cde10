"""Runs that lost their driver are handed over again, under the same name: `dtrain supervise`, or who follows one.

The cluster's word that nothing of a run is left there, or a lease that nobody renews, says that its driver is dead.
Both may be wrong, which the lease's token makes harmless.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dtrain import api, runs
from dtrain.errors import ClusterError, DtrainError, RetriesExhausted, Stopped

if TYPE_CHECKING:
    from dtrain.backends import Sight
    from dtrain.spec.cluster import ClusterSpec

UNKNOWN_S = 120.0
"""For so long a submit may be under way before its cluster knows of the run."""
FULL_S = 300.0
"""Time between two looks at runs that have ended: somebody may have resumed one."""
RETURN_CHECK_S = 2.0
UNSAID = "it does not say why"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Seen:
    """What there is to know of a run that has not ended."""

    has_driver: bool
    """One has taken it up, whether or not it lives."""
    is_owned: bool
    """Somebody keeps its lease."""
    can_look: bool
    """Its cluster can be asked."""
    sight: "Sight | None"
    losses: int
    """How often a driver of it was lost before."""
    allowed: int
    """How often one may be (`retry.driver`)."""
    silent_s: float
    """Since it was submitted, or somebody began to hand it over again."""
    is_asked_to_stop: bool = False


@dataclass(frozen=True)
class Verdict:
    action: Literal["leave", "again", "end", "stop"]
    why: str


def decide(seen: Seen) -> Verdict:
    """What to do about a run that says it is under way."""
    if not seen.has_driver:
        if seen.sight is not None and seen.sight.is_over and seen.losses:
            if seen.silent_s < UNKNOWN_S:
                return Verdict("leave", "somebody is handing it over")
            return _again(seen, "what the cluster has of it is from before")
        if seen.sight is not None and seen.sight.is_over:
            return Verdict("end", f"the cluster ended it before a driver began: {seen.sight.why or UNSAID}")
        if seen.can_look and seen.sight is None and seen.silent_s > UNKNOWN_S:
            return _again(seen, "the cluster knows nothing of it")
        return Verdict("leave", "it waits for its cluster")
    if seen.sight is not None:
        if not seen.sight.is_over:
            return Verdict("leave", "the cluster is at it")
        return _again(seen, f"the cluster ended its driver ({seen.sight.why or UNSAID})")
    if seen.is_owned:
        return Verdict("leave", "its driver keeps the lease")
    return _again(seen, "its driver is gone")


def _again(seen: Seen, why: str) -> Verdict:
    if seen.is_asked_to_stop:
        return Verdict("stop", f"{why}, and it was asked to stop")
    if seen.losses >= seen.allowed:
        return Verdict("end", f"retry.driver allows {seen.allowed}, all used; last: {why}")
    return Verdict("again", why)


class Watcher:
    """Looks over the runs of a storage, again and again; those that have ended are looked at now and then only."""

    def __init__(
        self, place: str, cluster: "ClusterSpec | None", say: Say, alive: Callable[[], None] = lambda: None
    ) -> None:
        """`alive` is called at the end of a look, and before each run: to hand many over takes a while."""
        self._place, self._cluster, self._say, self._alive = place, cluster, say, alive
        self._ended: set[str] = set()
        self._next_full = 0.0

    def look(self) -> int:
        """Look once; says what it does, and returns how many runs are under way."""
        if time.monotonic() >= self._next_full:
            self._ended, self._next_full = set(), time.monotonic() + FULL_S
        under_way = 0
        for run in runs.list_runs(self._place, but=self._ended):
            self._alive()
            if self._has_ended(run):
                self._ended.add(run.id)
                continue
            try:
                plan = run.plan
                if self._cluster is None or _place(plan.backend) == _place(self._cluster.backend):
                    under_way += 1
                    look_at(run, plan.backend if self._cluster is None else self._cluster.backend, self._say)
            except DtrainError as error:  # one run's trouble is not the others'
                self._say(f"{run.id}: {error.message}")
        self._alive()
        return under_way

    def _has_ended(self, run: runs.Run) -> bool:
        try:
            return run.stored_record().ended
        except DtrainError:
            return True  # an unreadable record is `ps`'s to show


def _place(backend: Any) -> tuple[str, str | None]:
    """Where a backend's runs are: two namespaces may keep theirs in one storage, and cannot see each other's."""
    return backend.name, getattr(backend, "namespace", None)


def look_at(run: runs.Run, options: Any, say: Say) -> bool:
    """Look at one run; True when it was handed over again."""
    plan = run.plan
    backend = api.backend_of(plan)
    record = run.stored_record()
    can_look = hasattr(backend, "look")
    sight = backend.look(run.id, options) if can_look else None
    events = run.events()
    seen = Seen(
        has_driver=record.driver_pid is not None,
        is_owned=run.is_owned(),
        can_look=can_look,
        sight=sight,
        losses=sum(event["event"] == "driver-lost" for event in events),
        allowed=plan.retry.driver,
        silent_s=time.time() - (events[-1]["time"] if record.submissions > 1 and events else record.created_at),
        is_asked_to_stop=run.stop_requested is not None,
    )
    verdict = decide(seen)
    if verdict.action == "leave":
        return False
    if verdict.action != "again":
        say(f"{run.id}: {verdict.why}; it ends here")
        error = Stopped if verdict.action == "stop" else RetriesExhausted if seen.has_driver else ClusterError
        run.end_dead(error(verdict.why))
        return False
    if not run.put_back(verdict.why, record):
        return False
    say(f"{run.id}: {verdict.why}; handing it over again")
    backend.send(backend.render(plan, run.path), options, say)
    return True


def revive(run: runs.Run, say: Say) -> bool:
    """What somebody does who follows a run and sees it lost; False when that is how it stays.

    Waits while its cluster starts a driver by itself. Only where the cluster can tell that nothing of it is left.
    """
    plan = run.plan
    backend = api.backend_of(plan)
    if not hasattr(backend, "look"):
        return False
    told = False
    while (sight := backend.look(run.id, plan.backend)) is not None and sight.brings_back:
        if not told:
            say(f"{run.id}: its driver is gone; its cluster starts another{f' ({sight.why})' if sight.why else ''}")
            told = True
        time.sleep(RETURN_CHECK_S)
        if run.stored_record().ended or run.is_owned():
            return True
    return look_at(run, plan.backend, say)
