"""A KubeRay operator for the loopback API server: it does with RayJobs what the real one was recorded to do, and what
it makes are real Ray clusters on this machine, in which the entry point runs as it would in a pod.

    with ApiServer() as api, ScriptedOperator(api) as operator:
        ...                                   submit, look, operator.kill_head(run)

One control loop, as the real one has: it looks at what there is, and brings it a step further. Everything listens on
loopback, at ports that were free: what KubeRay has on a pod's own address is here on 127.0.0.1.
"""

import base64
import json
import secrets
import shlex
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from api_refusals import Refusal
from api_server import ApiServer
from crd_schema import operator_mistakes
from kubelet import FINALIZER as HELD_BY_KUBELET
from kubelet import Kubelet, Object, now

from dtrain.backends.local import _free_ports

FINALIZER = "ray.io/rayjob-finalizer"
LOOK_S = 0.2
LETTERS = "bcdfghjklmnpqrstvwxz2456789"
HEAD = "127.0.0.2"
"""A head's address. Other pods have others: Ray takes 127.0.0.1 for a machine that stands alone."""
PORTS = ("gcs", "dashboard", "client", "agent", "agent-grpc", "metrics", "env")
OVER = ("Complete", "Failed", "ValidationFailed")
QUICK = {
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "0",  # the raylet need not wait for the dashboard
    "RAY_prestart_worker_first_driver": "0",
    # Nodes leave a head that is lost after a minute. Until then one on the same machine, unlike one in a pod, would
    # find them and think that it runs already.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "6",
}


class ScriptedOperator:
    """Runs while its block does; an error of its own is raised at the end of it."""

    def __init__(self, api: ApiServer) -> None:
        self.api = api
        # Ray's sockets lie in here, and their paths may be 107 bytes long.
        self.root = Path(tempfile.mkdtemp(prefix="kr-"))
        self.kubelet = Kubelet(api, self.root)
        self._heads: dict[str, dict[str, int]] = {}
        """The ports of the head, by the uid of its cluster."""
        self._num_workers = 0
        self._done = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="operator")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.kubelet.close()
        shutil.rmtree(self.root, ignore_errors=True)
        if self.error is not None and error is None:
            raise self.error

    # -- for tests -------------------------------------------------------------------------------------------

    def job(self, name: str, namespace: str = "dtrain") -> Object:
        made = self.api.get("RayJob", name, namespace)
        assert made is not None, name
        return made

    def pods_of(self, name: str, namespace: str = "dtrain") -> list[Object]:
        """The pods of a RayJob's Ray cluster, the head first."""
        cluster = self.job(name, namespace).get("status", {}).get("rayClusterName", "-")
        made = self.api.list("Pod", namespace, {"ray.io/cluster": cluster})
        return sorted(made, key=lambda pod: pod["metadata"]["labels"]["ray.io/node-type"] != "head")

    def head_pid(self, name: str, namespace: str = "dtrain") -> int:
        """The first process of the head's container; whoever kills it ends everything in there."""
        return self.kubelet.pod(self.pods_of(name, namespace)[0]["metadata"]["name"]).first_pid

    # -- the loop --------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while not self._done.wait(LOOK_S):
                for kind, look in (("RayJob", self._job), ("RayCluster", self._cluster)):
                    for made in self.api.list(kind, None):
                        try:
                            look(made)
                        except Refusal as refusal:
                            if refusal.code != 404:  # it was deleted in between
                                raise
                self.kubelet.sync()
        except BaseException as error:
            self.error = error

    def _job(self, job: Object) -> None:
        metadata, spec, status = job["metadata"], job["spec"], job.get("status") or {}
        stage = status.get("jobDeploymentStatus")
        if metadata.get("deletionTimestamp"):
            if FINALIZER in metadata.get("finalizers", ()):
                if stage == "Running" and status.get("jobStatus") in ("PENDING", "RUNNING"):
                    self._ask(job, "POST", f"/api/jobs/{status['jobId']}/stop")
                self._patch(job, {"metadata": {"finalizers": []}})
        elif stage in OVER:
            self._after(job)
        elif mistakes := operator_mistakes(job):
            message = f"The RayJob spec is invalid: {mistakes[0]}"
            self._set(job, jobDeploymentStatus="ValidationFailed", reason="ValidationFailed", message=message)
        elif not metadata.get("finalizers"):
            self._patch(job, {"metadata": {"finalizers": [FINALIZER], "generation": metadata["generation"] + 1}})
        elif spec.get("suspend"):
            self._set(job, jobDeploymentStatus="Suspended")
        elif stage in (None, "Suspended"):
            self._begin(job)
        elif stage == "Initializing":
            self._start(job)
        elif stage == "Running":
            self._follow(job)

    def _begin(self, job: Object) -> None:
        name = job["metadata"]["name"]
        cluster = f"{name}-{_letters()}"
        job_id = job["spec"].get("jobId") or f"{name}-{_letters()}"
        self._set(
            job,
            failed=0,
            succeeded=0,
            jobDeploymentStatus="Initializing",
            jobId=job_id,
            rayClusterName=cluster,
            startTime=now(),
        )
        labels = {
            "ray.io/job-submission-mode": job["spec"].get("submissionMode", "K8sJobMode"),
            "ray.io/originated-from-cr-name": name,
            "ray.io/originated-from-crd": "RayJob",
        }
        made = {
            "kind": "RayCluster",
            "apiVersion": "ray.io/v1",
            "metadata": self._owned(job, cluster, {**job["metadata"].get("labels", {}), **labels}),
            "spec": job["spec"]["rayClusterSpec"],
        }
        self.api.put(made)
        self.api.event(job, "CreatedRayCluster", f"Created RayCluster {job['metadata']['namespace']}/{cluster}")

    def _start(self, job: Object) -> None:
        cluster = self._cluster_of(job)
        limit = job["spec"].get("preRunningDeadlineSeconds")
        if cluster is None:
            return
        status = cluster.get("status", {})
        if status.get("state") == "ready":
            name, namespace = cluster["metadata"]["name"], cluster["metadata"]["namespace"]
            address = f"{name}-head-svc.{namespace}.svc.cluster.local:8265"
            self._set(job, jobDeploymentStatus="Running", dashboardURL=address, rayClusterStatus=status)
        elif limit and _age_s(job["status"]["startTime"]) > limit:
            text = f"The RayJob has passed the preRunningDeadlineSeconds. StartTime: {job['status']['startTime']}"
            self._end(job, "Failed", reason="PreRunningDeadlineExceeded", message=text)
        else:
            self._set(job, rayClusterStatus=status)

    def _follow(self, job: Object) -> None:
        """What Ray says of the job; a Ray that does not know it, as a new head does not, is given it (again)."""
        status = job["status"]
        job_id, limit = status["jobId"], job["spec"].get("activeDeadlineSeconds")
        if limit and _age_s(status["startTime"]) > limit:
            text = f"The RayJob has passed the activeDeadlineSeconds. StartTime: {status['startTime']}"
            self._end(job, "Failed", reason="DeadlineExceeded", message=text)
            return
        code, found = self._ask(job, "GET", f"/api/jobs/{job_id}")
        if code == 404:
            body = {"entrypoint": job["spec"]["entrypoint"], "submission_id": job_id}
            self._ask(job, "POST", "/api/jobs/", body)
        elif code == 200:
            said = {"jobStatus": found["status"], "message": found["message"]}
            if found["status"] in ("SUCCEEDED", "STOPPED"):
                self._end(job, "Complete", **said, succeeded=int(found["status"] == "SUCCEEDED"))
            elif found["status"] == "FAILED":
                self._end(job, "Failed", **said, reason="AppFailed", failed=1)
            else:
                cluster = self._cluster_of(job) or {}
                self._set(job, **said, rayClusterStatus=cluster.get("status", {}))

    def _end(self, job: Object, stage: str, **said: Any) -> None:
        self._set(job, jobDeploymentStatus=stage, endTime=now(), **said)

    def _after(self, job: Object) -> None:
        """When its time is over the Ray cluster goes, and the RayJob stays."""
        spec, status = job["spec"], job["status"]
        cluster = self._cluster_of(job)
        if spec.get("shutdownAfterJobFinishes") and cluster is not None and "endTime" in status:
            is_over = _age_s(status["endTime"]) >= spec.get("ttlSecondsAfterFinished", 0)
            if is_over and not cluster["metadata"].get("deletionTimestamp"):
                name, namespace = cluster["metadata"]["name"], cluster["metadata"]["namespace"]
                self.api.remove("RayCluster", name, namespace)
                self.api.event(job, "DeletedRayCluster", f"Deleted cluster {namespace}/{name}")

    # -- a Ray cluster ---------------------------------------------------------------------------------------

    def _cluster(self, cluster: Object) -> None:
        metadata, spec = cluster["metadata"], cluster["spec"]
        name, namespace = metadata["name"], metadata["namespace"]
        if metadata["uid"] not in self._heads:
            self._provide(cluster)
        pods = self.api.list("Pod", namespace, {"ray.io/cluster": name})
        heads = [pod for pod in pods if pod["metadata"]["labels"]["ray.io/node-type"] == "head"]
        if not heads:
            heads = [self._make_pod(cluster, spec["headGroupSpec"], HEAD)]
        wanted = ready = 0
        for group in spec.get("workerGroupSpecs", ()):
            of_group = {"ray.io/cluster": name, "ray.io/group": group["groupName"]}
            workers = self.api.list("Pod", namespace, of_group)
            wanted += group["replicas"]
            ready += sum(_is_ready(pod) for pod in workers)
            for _ in range(group["replicas"] - len(workers)):
                self._num_workers += 1
                self._make_pod(cluster, group, f"127.0.1.{self._num_workers}")
        status = dict(cluster.get("status") or {})
        is_up = _is_ready(heads[0])
        is_complete = is_up and ready == wanted
        first = {
            "message": "RayCluster Pods are being provisioned for first time",
            "reason": "RayClusterPodsProvisioning",
        }
        if is_complete or status.get("state") == "ready":  # never taken back
            status["state"] = "ready"
            first = {"message": "All Ray Pods are ready for the first time", "reason": "AllPodRunningAndReadyFirstTime"}
        head = {"reason": "HeadPodRunningAndReady" if is_up else "ContainersNotReady", "message": ""}
        conditions = [
            {"type": "HeadPodReady", "status": str(is_up), **head},
            {"type": "RayClusterProvisioned", "status": str("state" in status), **first},
            {"type": "RayClusterSuspended", "status": "False", "reason": "RayClusterSuspended", "message": ""},
        ]
        status |= {
            "desiredWorkerReplicas": wanted,
            "availableWorkerReplicas": ready,
            "readyWorkerReplicas": ready,
            "head": {"podName": heads[0]["metadata"]["name"], "serviceName": f"{name}-head-svc", "podIP": HEAD},
            "conditions": [{"lastTransitionTime": _since(cluster, one), **one} for one in conditions],
        }
        self.api.set_status("RayCluster", name, status, namespace)

    def _provide(self, cluster: Object) -> None:
        """Ports, the service before the head, and the token that opens it."""
        ports = self._heads[cluster["metadata"]["uid"]] = _ports()
        name, namespace = cluster["metadata"]["name"], cluster["metadata"]["namespace"]
        if cluster["spec"].get("authOptions", {}).get("mode") == "token":
            token = base64.b64encode(secrets.token_hex(32).encode()).decode()
            metadata = self._owned(cluster, name, {"ray.io/cluster": name})
            self.api.put({"kind": "Secret", "apiVersion": "v1", "metadata": metadata, "data": {"auth_token": token}})
        metadata = self._owned(cluster, f"{name}-head-svc", {"ray.io/cluster": name, "ray.io/node-type": "head"})
        port = {"name": "dashboard", "port": 8265, "protocol": "TCP", "targetPort": ports["dashboard"]}
        self.api.put({"kind": "Service", "apiVersion": "v1", "metadata": metadata, "spec": {"ports": [port]}})
        self.api.proxy(f"{name}-head-svc", 8265, f"http://{HEAD}:{ports['dashboard']}", namespace)

    def _make_pod(self, cluster: Object, group: Object, address: str) -> Object:
        kind = "head" if address == HEAD else "worker"
        name, head = cluster["metadata"]["name"], self._heads[cluster["metadata"]["uid"]]
        own = head if kind == "head" else _ports()
        template = group["template"]
        container, *others = template["spec"]["containers"]
        given = [f"--{key}={word}" for key, word in group.get("rayStartParams", {}).items() if key != "dashboard-host"]
        ray_start = shlex.join([*_ray_start(head, own, address, kind == "head"), *given])
        environment = [{"name": key, "value": value} for key, value in QUICK.items()]
        if cluster["spec"].get("authOptions", {}).get("mode") == "token":
            token = {"secretKeyRef": {"name": name, "key": "auth_token"}}
            environment += [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": token}]
        # KubeRay has workers wait for the head, too. Ray gives a node 30 s to start, which two at once might not take.
        is_up = f"exec 3<>/dev/tcp/{HEAD}/{head['agent']}"
        wait = f"until ({is_up}) 2>/dev/null; do sleep 0.2; done; " if kind == "worker" else ""
        run = {
            "command": ["/bin/bash", "-c", "--"],
            "args": [f"{wait}exec {ray_start} --temp-dir=$TMPDIR/ray"],
            "env": [*container.get("env", ()), *environment],
            "readinessProbe": {"httpGet": {"path": "/api/healthz", "host": address, "port": own["agent"]}},
        }
        group_name = group.get("groupName", "headgroup")
        labels = {
            "app.kubernetes.io/created-by": "kuberay-operator",
            "app.kubernetes.io/name": "kuberay",
            **template.get("metadata", {}).get("labels", {}),
            "ray.io/cluster": name,
            "ray.io/group": group_name,
            "ray.io/identifier": f"{name}-{kind}",
            "ray.io/is-ray-node": "yes",
            "ray.io/node-type": kind,
        }
        pod_name = f"{name}-head-{_letters()}" if kind == "head" else f"{name}-{group_name}-worker-{_letters()}"
        metadata = {**self._owned(cluster, pod_name, labels), "finalizers": [HELD_BY_KUBELET]}
        spec = {**template["spec"], "containers": [{**container, **run}, *others]}
        made = self.api.put({"kind": "Pod", "apiVersion": "v1", "metadata": metadata, "spec": spec})
        self.api.event(cluster, f"Created{kind.title()}Pod", f"Created {kind} Pod {metadata['namespace']}/{pod_name}")
        return made

    # -- parts of the above ----------------------------------------------------------------------------------

    def _cluster_of(self, job: Object) -> Object | None:
        return self.api.get("RayCluster", job["status"].get("rayClusterName", "-"), job["metadata"]["namespace"])

    def _owned(self, owner: Object, name: str, labels: dict[str, str]) -> Object:
        reference = {"apiVersion": "ray.io/v1", "kind": owner["kind"], "controller": True, "blockOwnerDeletion": True}
        reference |= {key: owner["metadata"][key] for key in ("name", "uid")}
        namespace = owner["metadata"]["namespace"]
        return {"name": name, "namespace": namespace, "labels": labels, "ownerReferences": [reference]}

    def _set(self, job: Object, **changes: Any) -> None:
        status = {"rayJobInfo": {}, **(job.get("status") or {}), **changes}
        job["status"] = status
        self.api.set_status("RayJob", job["metadata"]["name"], status, job["metadata"]["namespace"])

    def _patch(self, job: Object, change: Object) -> None:
        self.api.patch("RayJob", job["metadata"]["name"], change, job["metadata"]["namespace"])

    def _ask(self, job: Object, method: str, path: str, body: Object | None = None) -> tuple[int, Any]:
        """Ray's dashboard; 0 when it does not answer."""
        cluster = self._cluster_of(job)
        if cluster is None:
            return 0, None
        name, namespace = cluster["metadata"]["name"], cluster["metadata"]["namespace"]
        secret = self.api.get("Secret", name, namespace)
        headers = {"Content-Type": "application/json"}
        if secret is not None:
            headers["Authorization"] = f"Bearer {base64.b64decode(secret['data']['auth_token']).decode()}"
        asked = urllib.request.Request(
            f"http://{HEAD}:{self._heads[cluster['metadata']['uid']]['dashboard']}{path}",
            data=json.dumps(body).encode() if body is not None else b"" if method == "POST" else None,
            headers=headers,
            method=method,
        )
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, None
        except (OSError, ValueError):
            return 0, None


def _ray_start(head: dict[str, int], own: dict[str, int], address: str, is_head: bool) -> list[str]:
    """As KubeRay generates it, with ports that are free on this machine, which all pods share."""
    words = ["ray", "start", "--block", f"--node-ip-address={address}"]
    if is_head:
        words += ["--head", f"--port={own['gcs']}", f"--dashboard-host={address}", "--no-monitor"]
        words += [f"--dashboard-port={own['dashboard']}", f"--ray-client-server-port={own['client']}"]
    else:
        words += [f"--address={HEAD}:{head['gcs']}"]
    words += [f"--dashboard-agent-listen-port={own['agent']}", f"--dashboard-agent-grpc-port={own['agent-grpc']}"]
    return [*words, f"--metrics-export-port={own['metrics']}", f"--runtime-env-agent-port={own['env']}"]


def _ports() -> dict[str, int]:
    return dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))


def _is_ready(pod: Object) -> bool:
    conditions = {one["type"]: one["status"] for one in pod.get("status", {}).get("conditions", ())}
    return conditions.get("Ready") == "True" and not pod["metadata"].get("deletionTimestamp")


def _since(cluster: Object, condition: Object) -> str:
    """When a condition became what it is."""
    for old in (cluster.get("status") or {}).get("conditions", ()):
        if (old["type"], old["status"]) == (condition["type"], condition["status"]):
            return str(old["lastTransitionTime"])
    return now()


def _age_s(moment: str) -> float:
    return time.time() - datetime.fromisoformat(moment).astimezone(UTC).timestamp()


def _letters() -> str:
    return "".join(secrets.choice(LETTERS) for _ in range(5))
