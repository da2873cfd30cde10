"""Kubernetes with the KubeRay operator: a run is a RayJob, with a Ray cluster of its own or on one that stands.

Here is what a cluster file may say and what is sent; `dtrain.kubernetes` renders it, and its `verbs` send it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain import backends
from dtrain.backends import Sight
from dtrain.kubernetes.options import KubeRay

if TYPE_CHECKING:
    from dtrain.finding import Finding
    from dtrain.plan import AnyPlan

Say = Callable[[str], None]


class Options(KubeRay):
    """A Kubernetes cluster with the KubeRay operator: each run brings a Ray cluster of its own, which goes with it."""


class Submission(backends.Submission):
    """The objects of a run."""

    run_id: str
    name: str
    """What they are called: the id, as Kubernetes spells it."""
    namespace: str
    context: str | None
    objects: tuple[dict[str, Any], ...]
    """In the order in which they are sent: the RayJob, then what belongs to it."""

    def text(self) -> str:
        """What `kubectl apply -f -` would take."""
        from dtrain.kubernetes import render

        return render.text(self.objects)


def render(plan: "AnyPlan", run_path: Path | str) -> Submission:
    """The run's objects; of `run_path` only the last part counts, its id. Raises `InputError` for an id that no object
    can have."""
    from dtrain.kubernetes import names
    from dtrain.kubernetes.render import run_objects

    options: Any = plan.backend
    run_id = Path(run_path).name
    entrypoint = ("python", "-m", backends.REMOTE_DRIVER, "--storage", plan.storage, "--run", run_id)
    return Submission(
        backend="kuberay",
        entrypoint=entrypoint,
        run_path=f"{plan.storage}/{run_id}",
        resources=plan.workers.resources,
        num_nodes=plan.workers.num_nodes,
        run_id=run_id,
        name=names.object_name(run_id),
        namespace=options.namespace,
        context=options.context,
        objects=run_objects(plan, options, run_id, entrypoint),
    )


# -- the network: the same arguments, carried out by dtrain.kubernetes.verbs ------------------------------------


def send(submission: Submission, options: Options, say: Say) -> None:
    """Create the run's objects; those that are there already are left as they are. Raises `ClusterError`."""
    from dtrain.kubernetes import verbs

    verbs.send(submission, options, say)


def look(run_id: str, options: Options) -> Sight | None:
    """What the cluster sees of a run, and why it waits."""
    from dtrain.kubernetes import verbs

    return verbs.look(run_id, options)


def sights(options: Options) -> dict[str, Sight]:
    """What the cluster sees of all runs, by id."""
    from dtrain.kubernetes import verbs

    return verbs.sights(options)


def end(run_id: str, options: Options) -> bool:
    """Delete a run's objects, and wait until its pods are gone."""
    from dtrain.kubernetes import verbs

    return verbs.end(run_id, options)


def logs(run_id: str, options: Options, which: str, follows: bool) -> Iterator[bytes]:
    """What its pods print."""
    from dtrain.kubernetes import verbs

    return verbs.logs(run_id, options, which, follows)


def check(submission: Submission, options: Options) -> list[str]:
    """Let the API server validate the objects without keeping them; what it warned of."""
    from dtrain.kubernetes import verbs

    return verbs.check(submission, options)


def cluster_up(options: Options, say: Say) -> dict[str, Any]:
    """Make the standing Ray cluster, where there is none."""
    from dtrain.kubernetes import verbs

    return verbs.cluster_up(options, say)


def cluster_status(options: Options) -> dict[str, Any]:
    """What is known of the cluster."""
    from dtrain.kubernetes import verbs

    return verbs.cluster_status(options)


def cluster_scale(options: Options, num_nodes: int, say: Say) -> dict[str, Any]:
    """Give the standing Ray cluster another number of nodes."""
    from dtrain.kubernetes import verbs

    return verbs.cluster_scale(options, num_nodes, say)


def cluster_down(options: Options) -> list[str]:
    """Delete the standing Ray cluster; what was ended, a line each."""
    from dtrain.kubernetes import verbs

    return verbs.cluster_down(options)


def cluster_doctor(options: Options) -> "list[Finding]":
    """Whether the cluster has what runs need."""
    from dtrain.kubernetes import verbs

    return verbs.cluster_doctor(options)
