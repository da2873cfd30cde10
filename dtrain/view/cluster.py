"""What a run's cluster says of it, where its folder says nothing yet."""

from typing import BinaryIO

from dtrain import component
from dtrain.errors import ClusterError
from dtrain.plan import AnyPlan
from dtrain.runs import Run
from dtrain.view import words


def waits_for(run: Run, plan: AnyPlan) -> str:
    """What a run that no driver has taken up waits for, in its cluster's words; empty where that cannot tell."""
    backend = component.load("backends", plan.backend.name)
    if not hasattr(backend, "look"):
        return ""
    try:
        sight = backend.look(run.id, plan.backend)
    except ClusterError as error:
        return f"its cluster cannot be asked: {error.message}"
    if sight is None:
        name = words.called(run.where)
        move = f"if that stays so, `dtrain stop {name}` and then `dtrain resume {name}` start it anew"
        return f"its cluster has nothing of it; {move}"
    return f"{sight.phase}: {sight.why}" if sight.why else ""


def logs(run: Run, pattern: str, out: BinaryIO, follows: bool) -> bool:
    """Write what the cluster has of a log that is not in the run's folder yet; False when it has nothing."""
    plan = run.plan
    backend = component.load("backends", plan.backend.name)
    if not hasattr(backend, "logs"):
        return False
    if pattern != "driver.log":
        return False  # workers and agents print into the run's folder, and nowhere else
    written = False
    for data in backend.logs(run.id, plan.backend, "driver", follows):
        out.write(data)
        out.flush()
        written = written or bool(data)
    return written
