"""The Ray cluster that stays (`dtrain cluster up|status|scale|down`), and that runs share."""

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dtrain.errors import ClusterError, InputError
from dtrain.kubernetes import client, names, sight, verbs
from dtrain.kubernetes.client import POD, RAY_CLUSTER, RAY_JOB, Client, Object
from dtrain.kubernetes.errors import Refused
from dtrain.kubernetes.watch import watch

if TYPE_CHECKING:
    from dtrain.kubernetes.options import KubeRay

LOOK_AGAIN_S = 5.0
"""Longest time between two looks at a cluster that comes up."""
Say = Callable[[str], None]


def up(options: "KubeRay", say: Say) -> dict[str, Any]:
    """Make the cluster unless it is there, and wait until it can take runs; `say` tells what it waits for.

    Raises `ClusterError` when it does not come up within `pending_deadline_s`; it stays then, to be looked at.
    """
    from dtrain.kubernetes import render

    name, namespace = _name(options), options.namespace
    with client.of(options) as api:
        made, *others = render.cluster_objects(options)
        try:
            cluster, is_new = api.create(RAY_CLUSTER, namespace, made), True
            say(f"making Ray cluster {name} in namespace {namespace}")
        except Refused as refusal:
            found = api.get(RAY_CLUSTER, namespace, name) if refusal.code == 409 else None
            if found is None:
                raise
            _check_is_ours(found, options)
            cluster, is_new = found, False
        for other in others:
            verbs.create_beside(api, other, cluster, is_new)
        _await_ready(api, options, say)
        for text in dict.fromkeys(api.warnings):
            say(f"the cluster warns: {text}")
        return _status(api, options)


def status(options: "KubeRay") -> dict[str, Any]:
    """State, nodes, runs, and why it is not ready. Without `standing`: how the cluster at large can be reached."""
    with client.of(options) as api:
        if options.standing is None:
            version = api.ask("GET", "/version").json().get("gitVersion")
            found = {"state": "up", "server": api.access.server, "version": version, "namespace": options.namespace}
            return {**found, "runs": _runs(api, options, None)}
        return _status(api, options)


def scale(options: "KubeRay", num_nodes: int, say: Say) -> dict[str, Any]:
    """Give the cluster another number of nodes, and wait until they are there.

    Raises `InputError` for a cluster whose size is not fixed, `ClusterError`.
    """
    name = _name(options)
    if options.autoscaling is not None:
        raise InputError(f"Ray cluster {name} scales by itself; change backend.autoscaling, or leave it out")
    if num_nodes < 0:
        raise InputError(f"{num_nodes} nodes cannot be had; give 0 or more")
    with client.of(options) as api:
        found = api.get(RAY_CLUSTER, options.namespace, name)
        if found is None:
            raise _missing(options)
        _check_is_ours(found, options)
        at = "/spec/workerGroupSpecs/0"
        # minReplicas goes down first and maxReplicas up first in one patch: it is checked as a whole.
        fields = {"replicas": num_nodes, "minReplicas": num_nodes, "maxReplicas": max(1, num_nodes)}
        change = [{"op": "add", "path": f"{at}/{key}", "value": value} for key, value in fields.items()]
        api.patch(RAY_CLUSTER, options.namespace, name, [*change])
        say(f"Ray cluster {name} is to have {num_nodes} node{'s' if num_nodes != 1 else ''}")
        _await_ready(api, options, say, num_nodes)
        return _status(api, options)


def down(options: "KubeRay") -> list[str]:
    """Delete the runs on the cluster and the cluster; their pods have their time for a last checkpoint."""
    if options.standing is None:
        return []
    name, namespace = _name(options), options.namespace
    ended = []
    with client.of(options) as api:
        found = api.get(RAY_CLUSTER, namespace, name)
        if found is not None:
            _check_is_ours(found, options)
        ended += [f"stopped run {run_id}" for run_id in _runs(api, options, name) if verbs.end(run_id, options)]
        if found is not None:
            api.delete(RAY_CLUSTER, namespace, name, found["metadata"]["uid"])
            deadline = time.monotonic() + options.termination_grace_s + verbs.GONE_S
            verbs.await_gone(api, RAY_CLUSTER, namespace, f"metadata.name={name}", deadline)
            verbs.await_gone(api, POD, namespace, "", deadline, labels=f"ray.io/cluster={name}")
            ended.append(f"deleted Ray cluster {name} in namespace {namespace}")
    return ended


def _name(options: "KubeRay") -> str:
    if options.standing is None:
        raise InputError(
            "each run brings its own Ray cluster here, so there is none to manage; name one with"
            " backend.standing: {name: ...}, and runs will share it"
        )
    return options.standing.name


def _missing(options: "KubeRay") -> ClusterError:
    return ClusterError(
        f"there is no Ray cluster {_name(options)} in namespace {options.namespace}; `dtrain cluster up` makes it"
    )


def _check_is_ours(found: Object, options: "KubeRay") -> None:
    if (found["metadata"].get("labels") or {}).get(names.MANAGED_BY) != "dtrain":
        raise ClusterError(
            f"namespace {options.namespace} has a Ray cluster {_name(options)} that dtrain did not make; runs can use"
            " it, but it is managed by whoever made it"
        )


def _await_ready(api: Client, options: "KubeRay", say: Say, num_nodes: int | None = None) -> None:
    name, namespace, told = _name(options), options.namespace, ""
    deadline = time.monotonic() + options.pending_deadline_s
    while (left := deadline - time.monotonic()) > 0:
        chosen = f"metadata.name={name}"
        with contextlib.closing(
            watch(api, RAY_CLUSTER, namespace, fields=chosen, timeout_s=min(left, LOOK_AGAIN_S))
        ) as seen:
            for found in seen:
                if name not in found:
                    raise ClusterError(f"Ray cluster {name} in namespace {namespace} was deleted while it came up")
                if _is_ready(found[name], num_nodes):
                    return
        reason = _why(api, namespace, api.get(RAY_CLUSTER, namespace, name))
        if reason and reason != told:
            say(reason)
            told = reason
    text = f"Ray cluster {name} in namespace {namespace} is not ready after {options.pending_deadline_s} s"
    raise ClusterError(f"{text}: {told or 'no cause was given'}; `dtrain cluster down` takes it away")


def _is_ready(cluster: Object, num_nodes: int | None) -> bool:
    found, group = cluster.get("status") or {}, cluster["spec"]["workerGroupSpecs"][0]
    wanted = group.get("replicas", 0) if num_nodes is None else num_nodes
    head = sight.conditions(cluster).get("HeadPodReady", {}).get("status") == "True"
    num_ready = found.get("readyWorkerReplicas", 0)
    return head and (num_ready >= wanted if num_nodes is None else num_ready == wanted)


def _why(api: Client, namespace: str, cluster: Object | None) -> str:
    """What keeps the cluster from being ready, in one sentence."""
    if cluster is None:
        return ""
    pods, _ = api.list(POD, namespace, f"ray.io/cluster={cluster['metadata']['name']}")
    events = verbs.told_of(api, namespace, cluster, pods)
    reason = sight.heaviest(cluster, pods, events)
    if reason is not None:
        return reason.text
    return "" if pods else "its pods are being made"


def _status(api: Client, options: "KubeRay") -> dict[str, Any]:
    name, namespace = _name(options), options.namespace
    found = api.get(RAY_CLUSTER, namespace, name)
    place = {"name": name, "namespace": namespace, "server": api.access.server}
    if found is None:
        return {"state": "down", **place}
    state = found.get("status") or {}
    is_ready = _is_ready(found, None)
    return {
        "state": "up" if is_ready else "starting",
        **place,
        "nodes_ready": state.get("readyWorkerReplicas", 0),
        "nodes": found["spec"]["workerGroupSpecs"][0].get("replicas", 0),
        "why": "" if is_ready else _why(api, namespace, found),
        "head": (state.get("head") or {}).get("podName", ""),
        "runs": _runs(api, options, name),
    }


def _runs(api: Client, options: "KubeRay", cluster: str | None) -> list[str]:
    """Ids of the runs that have not ended: on one Ray cluster, or all."""
    jobs, _ = api.list(RAY_JOB, options.namespace, names.SELECTOR)
    found = []
    for job in jobs:
        on = (job["spec"].get("clusterSelector") or {}).get("ray.io/cluster")
        run_id = (job["metadata"].get("annotations") or {}).get(names.RUN_ID)
        if run_id and not sight.is_done(job) and cluster in (None, on):
            found.append(run_id)
    return sorted(found)
