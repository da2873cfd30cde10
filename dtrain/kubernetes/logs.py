"""What the pods of a run print: read once, or followed through cut connections and from one pod to its successor.

`driver` is Ray's own log of the run's driver where its dashboard lets us in (through the API server), else what the
head's pod prints; `head` is the head's pod, `node-0` the first worker pod by name.
"""

import base64
import contextlib
import http.client
import json
import re
import time
from collections.abc import Iterator
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
STAMP = re.compile(rb"^(\d{4}-\d\d-\d\dT\S+Z) ?(.*)$", re.DOTALL)


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
    seen: dict[str, str] = {}
    while True:
        job = verbs.find_job(api, run_id, options)
        pod = _pod(api, job, options.namespace, which)
        if pod is not None:
            yield from _lines(api, pod, options.namespace, follows, seen)
        elif not follows:
            why = sight.see(job).why if job else "it is not there any more"
            text = f"run {run_id} has no {'head' if which == 'driver' else which} on the cluster"
            raise ClusterError(f"{text} ({why or 'its pods are gone'}); its folder in storage has what was printed")
        if not follows or job is None or sight.is_done(job):
            return
        time.sleep(LOOK_AGAIN_S)


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


def _lines(api: Client, pod: Object, namespace: str, follows: bool, seen: dict[str, str]) -> Iterator[bytes]:
    """What one pod prints and was not read yet: `seen` keeps the time of the last line by pod.

    Lines have the time at which they were printed, which is how a stream goes on where another was cut.
    """
    name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
    container = pod["spec"]["containers"][0]["name"]
    path = POD.path(namespace, name, "log")
    while True:
        query = {"container": container, "timestamps": "true", "follow": "true" if follows else "false"}
        if last := seen.get(uid):
            query["sinceTime"] = last
        try:
            with api.stream(path, query, SILENCE_S) as lines:
                for line in lines:
                    found = STAMP.match(line)
                    stamp = found[1].decode() if found else ""
                    if stamp and stamp <= seen.get(uid, ""):
                        continue  # told before the cut
                    seen[uid] = stamp or seen.get(uid, "")
                    yield found[2] if found else line
            return
        except Refused as refusal:
            if refusal.code == 400 and not follows:  # its container has not started
                return
            if refusal.code not in (400, 404, 429, 500, 502, 503, 504) or not follows:
                raise
            return
        except (OSError, http.client.HTTPException):
            time.sleep(LOOK_AGAIN_S / 4)  # cut: go on from the last line


# -- Ray's dashboard ---------------------------------------------------------------------------------------------


def _dashboard(api: Client, run_id: str, options: "KubeRay", follows: bool) -> Iterator[bytes]:
    """The driver's log as Ray keeps it; nothing where its dashboard cannot be asked."""
    told = 0
    while True:
        job = verbs.find_job(api, run_id, options)
        status = (job or {}).get("status") or {}
        address, job_id = str(status.get("dashboardURL") or ""), status.get("jobId")
        if address and job_id:
            service = address.partition(".")[0]
            text = _job_log(api, options, service, str(job_id), str(status.get("rayClusterName")))
            if text is None:
                return
            data = text.encode()
            # A driver that was started again has a log of its own, from the beginning.
            new, told = (data[told:], len(data)) if len(data) >= told else (data, len(data))
            yield from new.splitlines(keepends=True)
        if not follows or job is None or sight.is_done(job) or not address:
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
