"""What a person and a platform team have in the stories: a kubeconfig, a cluster file, credentials of the storage, and
the real `dtrain` command; on the other side the loopback API server with the scripted operator.
"""

import base64
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from api_server import ApiServer
from kubelet import Object
from scripted_operator import ScriptedOperator

from dtrain import runs
from dtrain.runs import Run

ROOT = Path(__file__).parents[2]
KIND = ROOT / "clusters" / "kind.yaml"
JOB = ROOT / "tests" / "ray" / "job.yaml"
SECRET = "dtrain-storage"
SHARED_MEMORY = Path("/dev/shm")
PATIENCE_S = 240.0


class Story:
    """`dtrain` as it is typed, and where to look afterwards."""

    def __init__(self, api: ApiServer, operator: ScriptedOperator, home: Path, storage: str) -> None:
        self.api, self.operator, self.home, self.storage = api, operator, home, storage
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(home),
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": str(home / "tmp"),
            "KUBECONFIG": str(api.kubeconfig(home / "kubeconfig", context="kind-dtrain")),
        }
        self.settings = ["cluster.backend.namespace=dtrain", f"cluster.storage={storage}"]
        self._followers: list[subprocess.Popen[bytes]] = []
        (home / "tmp").mkdir()

    def share_folder(self) -> None:
        """The storage is a folder of the nodes that every pod sees."""
        folder = str(Path(self.storage).parent)
        self.settings += [f"cluster.backend.volumes=[{{mount: {folder}, host_path: {folder}}}]"]

    def give_credentials(self, chain: dict[str, str]) -> None:
        """To the person as environment, to the pods as the Secret of the cluster file."""
        self.environment |= chain
        data = {name: base64.b64encode(value.encode()).decode() for name, value in chain.items()}
        metadata = {"name": SECRET, "namespace": "dtrain"}
        self.api.put({"kind": "Secret", "apiVersion": "v1", "metadata": metadata, "data": data})
        self.settings += ["cluster.backend.volumes=[]", f"cluster.backend.env_from=[{SECRET}]"]

    @contextlib.contextmanager
    def told(self) -> Iterator["Story"]:
        """Ends what was left following."""
        try:
            yield self
        finally:
            for follower in self._followers:
                follower.kill()
                follower.wait()

    # -- what is typed ---------------------------------------------------------------------------------------

    def dtrain(self, *words: str, code: int = 0) -> str:
        """What the command printed; it must end with `code`."""
        done = subprocess.run(
            [sys.executable, "-m", "dtrain", *words],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env=self.environment,
            cwd=self.home,
            check=False,
        )
        assert done.returncode == code, f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, *settings: str) -> str:
        """The id of the run."""
        words = ["submit", str(JOB), "--cluster", str(KIND), "--detach", "--json"]
        for setting in (*self.settings, "retry.hang_timeout_s=60", *settings):
            words += ["--set", setting]
        said = self.dtrain(*words)
        return str(json.loads(said[said.index("{") : said.rindex("}") + 1])["id"])

    def follow(self, *words: str) -> Path:
        """The file that a command which goes on writes to."""
        path = self.home / f"followed-{len(self._followers)}"
        with path.open("wb") as file:
            command = [sys.executable, "-m", "dtrain", *words, "--storage", self.storage]
            self._followers.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=self.environment, cwd=self.home
                )
            )
        return path

    def followed_to_the_end(self) -> list[int]:
        """The exit codes of all that were followed."""
        return [follower.wait(timeout=PATIENCE_S) for follower in self._followers]

    def look(self, *words: str) -> str:
        return self.dtrain(*words, "--storage", self.storage)

    def status(self, run: str) -> dict[str, Any]:
        return dict(json.loads(self.look("status", run, "--json")))

    def run(self, run: str) -> Run:
        return runs.find(self.storage, run)

    def until(self, run: str, what: Callable[[Run], bool]) -> None:
        """Until something is so. A run that has ended, or an operator that has, is not waited for; a lost one is."""
        deadline = time.monotonic() + PATIENCE_S
        while not what(self.run(run)):
            assert self.operator.error is None, self.operator.error
            if self.run(run).stored_record().ended:
                assert what(self.run(run)), self.report(run)  # it may have ended since the look before
                return
            assert time.monotonic() < deadline, self.report(run)
            time.sleep(0.5)

    # -- what is there ---------------------------------------------------------------------------------------

    def rayjob(self, run: str) -> Object:
        return self.operator.job(run.replace("_", "-"))

    def until_rayjob(self, run: str, what: Callable[[Object], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not what(self.rayjob(run).get("status", {})):
            assert time.monotonic() < deadline, self.rayjob(run).get("status")
            assert self.operator.error is None, self.operator.error
            time.sleep(0.1)

    def objects(self) -> list[str]:
        """All that is on the server of what a run brings."""
        kinds = ("RayJob", "RayCluster", "Pod", "Service", "Secret", "NetworkPolicy")
        found = [f"{kind} {made['metadata']['name']}" for kind in kinds for made in self.api.list(kind, None)]
        return [name for name in found if name != f"Secret {SECRET}"]

    def until_gone(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while left := self.objects():
            assert time.monotonic() < deadline, left
            time.sleep(0.1)

    def report(self, run: str) -> str:
        """Everything that may say why a story did not go on."""
        told = [self.look("status", run, "--json"), json.dumps(self.rayjob(run).get("status"), indent=1)]
        for (_, pod, _), lines in self.api.logs.items():
            told.append(f"{pod}:\n{b''.join(line.text for line in lines)[-3000:].decode()}")
        for words in (["--driver"], ["--agent"], []):
            with contextlib.suppress(AssertionError):
                told.append(self.look("logs", run, "-n", "50", *words))
        return "\n".join(told)

    def left_behind(self) -> list[str]:
        """What there still is of runs that are over: objects, processes, folders, shared memory."""
        mark = str(self.operator.root)
        owners = [path for path in SHARED_MEMORY.glob("dtrain-*-owner") if path.read_text().startswith(mark)]
        folders = [*self.operator.root.iterdir(), *(self.home / "tmp").iterdir()]
        return [*self.objects(), *left_on_this_machine(mark), *map(str, owners), *map(str, folders)]


def left_on_this_machine(mark: str) -> list[str]:
    """Processes that have `mark` in their environment or command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                if mark.encode() in words:
                    found.append(words[:200].replace(b"\0", b" ").decode(errors="replace"))
    return found
