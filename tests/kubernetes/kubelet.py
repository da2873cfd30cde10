"""Runs the pods of the loopback API server as processes of this machine: what a scheduler and a kubelet would do.

A pod gets an environment of its own (nothing of who started the tests but PATH and the sources, which stand for its
image), a folder for /tmp, and its output as its log. Its first process restarts when it ends; when the pod is deleted,
its preStop hook runs, then SIGTERM, then, after the grace, nothing is left.
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from api_server import ApiServer

FINALIZER = "dtrain.dev/test-kubelet"
POLL_S = 0.1
NICENESS = 0
HERE = Path(__file__).parent
Object = dict[str, Any]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Kubelet:
    """Every pod of the server, wherever it is scheduled."""

    def __init__(self, api: ApiServer, root: Path) -> None:
        self.api, self.root = api, root
        self.pods: dict[str, Pod] = {}
        """By uid."""

    def sync(self) -> None:
        for made in self.api.list("Pod", None):
            if made["metadata"]["uid"] not in self.pods:
                self.pods[made["metadata"]["uid"]] = Pod(self.api, self.root / f"p{len(self.pods)}", made)
        for pod in self.pods.values():
            if pod.error is not None:
                raise pod.error

    def pod(self, name: str) -> "Pod":
        return next(pod for pod in self.pods.values() if pod.name == name)

    def close(self) -> None:
        for pod in self.pods.values():
            pod.drop()


class Pod:
    """One pod, and the thread that looks after it."""

    def __init__(self, api: ApiServer, folder: Path, made: Object) -> None:
        self.api, self.folder = api, folder
        self.name, self.namespace = made["metadata"]["name"], made["metadata"]["namespace"]
        self.spec = made["spec"]
        (self.container,) = self.spec["containers"]
        self.num_restarts = 0
        self.error: BaseException | None = None
        self.is_ready = False
        self._started_at = made["metadata"]["creationTimestamp"]
        self._process: subprocess.Popen[bytes] | None = None
        self._ended: Object | None = None
        self._is_dropped = threading.Event()
        self._env: dict[str, str] = {}
        (folder / "tmp").mkdir(parents=True)
        self._thread = threading.Thread(target=self._guarded, name=f"pod {self.name}")
        self._thread.start()

    @property
    def first_pid(self) -> int:
        """Of the container's first process, which `kill -9` ends with everything in it."""
        return int((self.folder / "pid").read_text())

    def drop(self) -> None:
        """As when its machine loses power."""
        self._is_dropped.set()
        self._thread.join()

    # -- its life ------------------------------------------------------------------------------------------------

    def _guarded(self) -> None:
        try:
            self._live()
        except BaseException as error:
            self.error = error
        finally:
            self._kill()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _live(self) -> None:
        self._tell()
        self._start()
        with open(self.folder / "log", "rb") as log:
            while not self._is_dropped.wait(POLL_S):
                made = self.api.get("Pod", self.name, self.namespace)
                if made is None or made["metadata"].get("deletionTimestamp"):
                    self._end(made)
                    self._say(log)
                    self.api.end_log(self.name, self.namespace)
                    with contextlib.suppress(Exception):  # it is gone already
                        self.api.patch("Pod", self.name, {"metadata": {"finalizers": []}}, self.namespace)
                    return
                self._say(log)
                assert self._process is not None
                if (code := self._process.poll()) is not None:
                    self._restart(code)
                elif not self.is_ready and self._is_up():
                    self.is_ready = True
                    self._tell()

    def _start(self) -> None:
        (self.folder / "pid").unlink(missing_ok=True)
        self._env = self._environment()
        command = [sys.executable, str(HERE / "container.py"), str(self.folder / "pid")]
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [*command, *self.container.get("command", ()), *self.container.get("args", ())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self._env,
                cwd=self.folder / "tmp",
                start_new_session=True,
                preexec_fn=lambda: os.nice(NICENESS),
            )
        self._started_at = now()
        self._tell()

    def _restart(self, code: int) -> None:
        self._kill()
        self.is_ready, self.num_restarts = False, self.num_restarts + 1
        self._ended = {"exitCode": code, "reason": "Error", "startedAt": self._started_at, "finishedAt": now()}
        self._tell()
        # What a container wrote is lost with it; volumes, as /tmp is one, are the pod's.
        self._is_dropped.wait(1.0)
        self._start()

    def _end(self, made: Object | None) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self.spec.get("terminationGracePeriodSeconds", 30)
        hook = self.container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        if hook and made is not None and self._process.poll() is None:
            with open(self.folder / "log", "ab") as log, contextlib.suppress(subprocess.TimeoutExpired):
                left = max(0.1, deadline - time.monotonic())
                subprocess.run(hook, env=self._env, stderr=log, timeout=left, check=False)
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        while self._process.poll() is None and time.monotonic() < deadline and not self._is_dropped.wait(POLL_S):
            pass
        self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()

    # -- what is in it -------------------------------------------------------------------------------------------

    def _environment(self) -> dict[str, str]:
        bin_folder = Path(sys.executable).parent
        of_image = {
            "PATH": f"{bin_folder}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(HERE.parents[1]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOSTNAME": self.name,
        }
        made = {"TMPDIR": "/tmp"}
        for source in self.container.get("envFrom", ()):
            made |= self._secret(source["secretRef"]["name"])
        for given in self.container.get("env", ()):
            if "value" in given:
                made[given["name"]] = given["value"]
            else:
                key = given["valueFrom"]["secretKeyRef"]
                made[given["name"]] = self._secret(key["name"])[key["key"]]
        return of_image | {name: self._here(value) for name, value in made.items()}

    def _secret(self, name: str) -> dict[str, str]:
        made = self.api.get("Secret", name, self.namespace)
        assert made is not None, f"pod {self.name} wants the Secret {name}"
        return {key: base64.b64decode(value).decode() for key, value in made["data"].items()}

    def _here(self, value: str) -> str:
        """A path in the pod as it is on this machine: what is mounted from the node is where it is."""
        volumes = {volume["name"]: volume for volume in self.spec.get("volumes", ())}
        for mount in self.container.get("volumeMounts", ()):
            volume, path = volumes[mount["name"]], mount["mountPath"]
            if "hostPath" in volume:
                assert volume["hostPath"]["path"] == path, f"{path} would have to be mounted"
                assert Path(path).is_dir(), path
            elif path == "/tmp" and (value == path or value.startswith(f"{path}/")):
                return str(self.folder / "tmp") + value.removeprefix(path)
        return value

    def _is_up(self) -> bool:
        probe = self.container["readinessProbe"]["httpGet"]
        token = self._env.get("RAY_AUTH_TOKEN", "")
        asked = urllib.request.Request(
            f"http://{probe['host']}:{probe['port']}{probe['path']}", headers={"X-Ray-Authorization": f"Bearer {token}"}
        )
        try:
            with urllib.request.urlopen(asked, timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    # -- what is told of it --------------------------------------------------------------------------------------

    def _say(self, log: Any) -> None:
        if data := log.read():
            with contextlib.suppress(AssertionError):  # the pod was deleted in between
                self.api.log(self.name, data, self.namespace)

    def _tell(self) -> None:
        state: Object = {"waiting": {"reason": "ContainerCreating"}}
        if self._process is not None and self._process.returncode is None:
            state = {"running": {"startedAt": self._started_at}}
        elif self._ended is not None:
            state = {"terminated": self._ended}
        is_ready = "True" if self.is_ready else "False"
        why = {} if self.is_ready else {"reason": "ContainersNotReady"}
        status = {
            "phase": "Pending" if "waiting" in state else "Running",
            "podIP": "127.0.0.1",
            "hostIP": "127.0.0.1",
            "startTime": self._started_at,
            "conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Initialized", "status": "True"},
                {"type": "ContainersReady", "status": is_ready, **why},
                {"type": "Ready", "status": is_ready, **why},
            ],
            "containerStatuses": [
                {
                    "name": self.container["name"],
                    "image": self.container["image"],
                    "ready": self.is_ready,
                    "restartCount": self.num_restarts,
                    "state": state,
                    "lastState": {"terminated": self._ended} if self._ended else {},
                }
            ],
        }
        with contextlib.suppress(Exception):  # it was deleted in between, as the loop is about to see
            self.api.set_status("Pod", self.name, json.loads(json.dumps(status)), self.namespace)
