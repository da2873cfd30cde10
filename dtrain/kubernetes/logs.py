"""What the pods of a run print: read once, or followed through cut connections and from one pod to its successor.

`driver` is Ray's own log of the run's driver where its dashboard lets us in (through the API server), else what the
head's pod prints; `head` is the head's pod, `node-0` the first worker pod by name.
"""

import base64
import contextlib
import json
import re
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from dtrain.errors import ClusterError, InputError
from dtrain.kubernetes import client, sight, verbs
from dtrain.kubernetes.client import KINDS, POD, Client, Kind, Object
from dtrain.kubernetes.errors import Refused

if TYPE_CHECKING:
    from dtrain.kubernetes.options import KubeRay

SILENCE_S = 60.0
"""A stream that says nothing for so long is opened anew: its connection may be dead without a word."""
LOOK_AGAIN_S = 1.0
DASHBOARD = "8265"
SERVICE = Kind("Service", "services")
MOST_CUTS = 20
"""Times that a log is opened anew without another line of it."""
STAMP = re.compile(rb"^(\d{4}-\d\d-\d\dT[0-9:.]+(?:Z|[+-]\d\d:\d\d)) ?(.*)$", re.DOTALL)
FRACTION = re.compile(r"\.(\d+)")


def read(run_id: str, options: "KubeRay", which: str, follows: bool) -> Iterator[bytes]:
    """Lines, until there are no more; with `follows` until the run is over.

    Raises `InputError` for a name of nothing, `ClusterError` where the run has no pods (any more).
    """
    if which not in ("driver", "head") and not re.fullmatch(r"node-\d+", which):
        raise InputError(f"pods print no log {which!r}; there is: driver, head, node-0, node-1, ...")
    with client.of(options) as api:
        if which == "driver":
            told = _dashboard(api, run_id, options, follows)
            if (first := next(told, None)) is not None:
                yield first
                yield from told
                return
        yield from _pods(api, run_id, options, which, follows)


def _pods(api: Client, run_id: str, options: "KubeRay", which: str, follows: bool) -> Iterator[bytes]:
    told: dict[str, _Told] = {}
    while True:
        job = verbs.find_job(api, run_id, options)
        pod = _pod(api, job, options.namespace, which)
        is_cut = False
        if pod is not None:
            is_cut = yield from _lines(api, pod, options.namespace, follows, told)
        elif not follows:
            why = sight.see(job).why if job else "it is not there any more"
            text = f"run {run_id} has no {'head' if which == 'driver' else which} on the cluster"
            raise ClusterError(f"{text} ({why or 'its pods are gone'}); its folder in storage has what was printed")
        if not is_cut and (not follows or job is None or sight.is_done(job)):
            return
        time.sleep(LOOK_AGAIN_S / 4 if is_cut else LOOK_AGAIN_S)


@dataclass
class _Told:
    """How far a pod's log was read."""

    stamp: str = ""
    """The time of the last line, as it was given."""
    num_cuts: int = 0
    """Since then, without another line."""


def _pod(api: Client, job: Object | None, namespace: str, which: str) -> Object | None:
    """The pod that is meant, of the run's Ray cluster as it is now."""
    name = ((job or {}).get("status") or {}).get("rayClusterName")
    if not name:
        return None
    kind = "worker" if which.startswith("node-") else "head"
    found, _ = api.list(POD, namespace, f"ray.io/cluster={name},ray.io/node-type={kind}")
    found.sort(key=lambda pod: str(pod["metadata"]["name"]))
    if kind == "head":  # of a head that is lost and its successor the successor
        found.sort(key=lambda pod: str(pod["metadata"].get("creationTimestamp")), reverse=True)
    number = int(which.rpartition("-")[2]) if kind == "worker" else 0
    return found[number] if number < len(found) else None


def _lines(
    api: Client, pod: Object, namespace: str, follows: bool, told: dict[str, _Told]
) -> Generator[bytes, None, bool]:
    """What one pod prints and was not told yet; True when that was cut, and there may be more."""
    mark = told.setdefault(pod["metadata"]["uid"], _Told())
    name = pod["spec"]["containers"][0]["name"]
    asked = [{"container": name, "follow": str(follows).lower()}]
    states = (pod.get("status") or {}).get("containerStatuses") or ()
    if not mark.stamp and any(state["name"] == name and state.get("restartCount") for state in states):
        asked.insert(0, {"container": name, "previous": "true"})  # why it was started again
    for query in asked:
        if (yield from _stream(api, pod, namespace, query, mark)):
            return True
    return False


def _stream(
    api: Client, pod: Object, namespace: str, query: dict[str, str], mark: _Told
) -> Generator[bytes, None, bool]:
    """One answer to a question for a log; True when it was cut.

    Lines come with the time at which they were printed, which is how a stream goes on where another was cut.
    """
    query = {**query, "timestamps": "true", **({"sinceTime": mark.stamp} if mark.stamp else {})}
    try:
        with api.stream(POD.path(namespace, pod["metadata"]["name"], "log"), query, SILENCE_S) as lines:
            for line in lines:
                found = STAMP.match(line)
                stamp = found[1].decode() if found else ""
                if stamp and mark.stamp and moment(stamp) <= moment(mark.stamp):
                    continue  # told before the cut: a time to go on from counts in whole seconds
                mark.stamp, mark.num_cuts = stamp or mark.stamp, 0
                yield found[2] if found else line
        return False
    except Refused as refusal:
        if refusal.code in (400, 404):  # its container has not begun, or it is gone
            return False
        if refusal.code not in (401, 429, 500, 502, 503, 504) or mark.num_cuts >= MOST_CUTS:
            raise
    except TimeoutError as trouble:
        if query.get("follow") != "true":
            raise api.unreachable(trouble) from trouble
        return True  # a pod may be silent for as long as it likes
    except OSError as trouble:
        # Where nothing can be reached any more, whoever looks for the pod next says so.
        if mark.num_cuts >= MOST_CUTS:
            raise api.unreachable(trouble) from trouble
    mark.num_cuts += 1
    return True


def moment(stamp: str) -> tuple[datetime, str]:
    """A time to the nanosecond, in an order."""
    found = FRACTION.search(stamp)
    digits = found[1] if found else ""
    return datetime.fromisoformat(FRACTION.sub("", stamp)), digits.ljust(9, "0")


# -- Ray's dashboard ---------------------------------------------------------------------------------------------


def _dashboard(api: Client, run_id: str, options: "KubeRay", follows: bool) -> Iterator[bytes]:
    """The driver's log as Ray keeps it; nothing where its dashboard cannot be asked.

    Once it told something it is waited for: a head that is lost takes its dashboard along, and its successor has one.
    """
    told = b""
    while True:
        job = verbs.find_job(api, run_id, options)
        status = (job or {}).get("status") or {}
        address, job_id = str(status.get("dashboardURL") or ""), status.get("jobId")
        text = None
        if address and job_id:
            service = address.partition(".")[0]
            text = _job_log(api, options, service, str(job_id), str(status.get("rayClusterName")))
        if text is not None:
            data = text.encode()
            # A driver that was started again has a log of its own, from the beginning.
            new, told = data[len(told) if data.startswith(told) else 0 :], data
            yield from new.splitlines(keepends=True)
        if not follows or job is None or sight.is_done(job) or (text is None and not told):
            return
        time.sleep(LOOK_AGAIN_S)


def _job_log(api: Client, options: "KubeRay", service: str, job_id: str, cluster: str) -> str | None:
    path = SERVICE.path(options.namespace, f"{service}:{DASHBOARD}", f"proxy/api/jobs/{job_id}/logs")
    try:
        # The API server takes `Authorization` for itself: Ray looks for this one, too.
        token = _ray_token(api, options, cluster)
        headers = {"X-Ray-Authorization": f"Bearer {token}"} if token else {}
        return str(api.ask("GET", path, headers=headers).json().get("logs", ""))
    except (ClusterError, json.JSONDecodeError):
        return None


def _ray_token(api: Client, options: "KubeRay", cluster: str) -> str | None:
    """The token of a Ray cluster; the operator keeps it in a Secret of the cluster's name. Raises `Refused`."""
    if options.auth.mode == "disabled":
        return None
    secret = api.get(KINDS["Secret"], options.namespace, options.auth.secret or cluster)
    with contextlib.suppress(ValueError):
        return base64.b64decode(((secret or {}).get("data") or {}).get("auth_token", "")).decode()
    return None
