"""Where the API server is and who we are: the official client reads it from a kubeconfig, or from a pod's own account.

Here is what it leaves to others: which file, in what words a mistake is told, and that no token goes astray.
"""

import contextlib
import logging
import logging.handlers
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dtrain import __version__
from dtrain.component import suggestion
from dtrain.errors import ClusterError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod finds the token of its account."""
GET_ONE = (
    "get one from whoever runs the cluster (gcloud container clusters get-credentials, aws eks update-kubeconfig,"
    " az aks get-credentials), or name its path with backend.kubeconfig"
)
LOGINS = {
    "gke-gcloud-auth-plugin": "gcloud auth login",
    "gcloud": "gcloud auth login",
    "aws": "aws sso login (or renew the keys that the aws command uses)",
    "aws-iam-authenticator": "aws sso login (or renew the keys that the aws command uses)",
    "kubelogin": "az login",
}
"""How to log in again, by the command that a kubeconfig asks for credentials."""
LOGIN_S = 60.0
"""Longest time that a login may take with nobody there: its command may wait for a person, or a server, for ever."""
LOGIN_BY_HAND_S = 900.0
"""The same on a terminal, where somebody may have to fetch a telephone; codes to type in are good for so long."""
STOPPED_S = 1.0
"""How long a login command gets to be gone once it is killed."""


class Access:
    """One API server and one identity there. Raises `ClusterError` when they cannot be had."""

    def __init__(self, files: list[Path], context: str | None) -> None:
        self._files, self._context = files, context
        self.source = "this pod's service account"
        """In words, for messages: `context gke_h100 of ~/.kube/config`."""
        self.login = "get a new kubeconfig"
        """The next move of somebody whose credentials are refused."""
        self._configuration: Any = None
        self._extra: dict[str, str] = {}
        self._may_hang = False
        """A command or another server is asked for credentials."""
        self.renew()

    @property
    def server(self) -> str:
        return str(self._configuration.host)

    @property
    def host(self) -> str:
        return urlsplit(self.server).netloc

    def renew(self) -> None:
        """Read everything anew: files that others renew, a login command that is asked again."""
        try:
            from kubernetes import client, config
        except ModuleNotFoundError as error:
            text = f"package {error.name} is not installed, which clusters on Kubernetes need"
            raise ClusterError(f"{text}; run: pip install 'dtrain[kubernetes]'") from error
        made = client.Configuration(host="")
        made.retries = False  # they are counted in one place, and that is not urllib3
        if self._files:
            self._read(made)
        else:
            token, authority = str(ACCOUNT / "token"), str(ACCOUNT / "ca.crt")
            with _told(f"{self.source}: it cannot be used", GET_ONE):
                config.incluster_config.InClusterConfigLoader(token, authority).load_and_set(made)
        self._configuration = made

    def _read(self, made: Any) -> None:
        from kubernetes.config.kube_config import KubeConfigLoader, KubeConfigMerger

        where = ", ".join(str(file) for file in self._files)
        with _told(f"{where}: this kubeconfig cannot be read", GET_ONE):
            merger = KubeConfigMerger(os.pathsep.join(str(file) for file in self._files))
            merged = merger.config.value
            there = sorted(str(node.value["name"]) for node in merged["contexts"])
            # The merger takes the last one there is, kubectl the first.
            current = [name for each in merger.config_files.values() if (name := each.get("current-context"))]
        wanted = self._context or (str(current[0]) if current else "")
        if not wanted:
            text = f"{where}: no context is chosen; set backend.context to one of {', '.join(there) or 'its contexts'}"
            raise ClusterError(text)
        if wanted not in there:
            said = "backend.context" if self._context else "current-context"
            others = f"; there is: {', '.join(there)}" if len(there) < 20 else suggestion(wanted, there)
            raise ClusterError(f"{where}: {said} is {wanted!r}, which it does not have{others or f'; {GET_ONE}'}")
        self.source = f"context {wanted} of {where}"
        with _told(f"{self.source}: it cannot be used", GET_ONE):
            names = _entry(merged, "context", wanted)
            cluster, user = _entry(merged, "cluster", names.get("cluster")), _entry(merged, "user", names.get("user"))
            command = Path(str((user.get("exec") or {}).get("command", ""))).name
            self.login = LOGINS.get(command) or (f"log in again with {command}" if command else self.login)
            self._may_hang = bool({"exec", "auth-provider"} & user.keys())
            loader = KubeConfigLoader
            with _heard() as heard:
                self._log_in(
                    lambda: loader(
                        merger.config, wanted, config_base_path=None, config_persister=merger.save_changes
                    ).load_and_set(made)
                )
        if heard and "exec" in user:
            raise self._no_login(user["exec"], " ".join(heard[-1].split()))
        if urlsplit(made.host).scheme not in ("http", "https") or not urlsplit(made.host).hostname:
            raise ClusterError(f"{self.source}: its server {made.host!r} is no address; {GET_ONE}")
        # What the library does not read.
        self._extra = {"Impersonate-User": str(user["as"])} if "as" in user else {}
        if "proxy-url" in cluster:
            made.proxy, made.no_proxy = cluster["proxy-url"], None

    def _log_in(self, work: Callable[[], None]) -> None:
        """Let the library do what may run a login command, to which it sets no limit. Raises `ClusterError`."""
        if not self._may_hang:
            work()
            return
        limit_s = LOGIN_BY_HAND_S if sys.stdout.isatty() else LOGIN_S  # as the library tells one from the other
        if not _within(limit_s, work):
            text = f"{self.source}: its login has not ended after {limit_s:g} s"
            raise ClusterError(f"{text}; run kubectl by hand to see what it waits for, then {self.login}")

    def _no_login(self, wanted: Mapping[str, Any], said: str) -> ClusterError:
        where = f"{self.source}: its login command {wanted.get('command')}"
        if "No such file" in said:
            hint = " ".join(str(wanted.get("installHint") or f"install {wanted.get('command')}").split())
            return ClusterError(f"{where} is not installed; {hint}")
        # On a terminal it has said why there, and the library stumbles over the text that it does not have.
        why = "see above what it says" if "NoneType" in said else said[:300]
        return ClusterError(f"{where} failed ({why}); try: {self.login}")

    def connect(self) -> Any:
        """An `ApiClient` with connections of its own; raises `ClusterError` for a proxy of another kind."""
        import urllib3
        from kubernetes import client

        if not self._configuration.verify_ssl:  # so it is asked for, and kubectl does not warn of it either
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        try:
            made = client.ApiClient(self._configuration)
        except urllib3.exceptions.HTTPError as error:
            text = f"{self.source}: the proxy {self._configuration.proxy} is not of the http:// kind"
            raise ClusterError(f"{text}; set another one as proxy-url") from error
        made.user_agent = f"dtrain/{__version__}"
        return made

    def headers(self, api: Any) -> dict[str, str]:
        """What says who we are, renewed when it is about to run out.

        As in kubectl, no token goes over a connection that others can read.
        """
        headers = {"Accept": "application/json", **api.default_headers, **self._extra}
        if urlsplit(self.server).scheme == "https":
            # What a command says that fails is not shown: the old credentials are refused then, and the next try told.
            with _told(f"{self.source}: its credentials cannot be renewed", self.login), _heard():
                self._log_in(lambda: api.update_params_for_auth(headers, [], ["BearerToken"]))
        return {key: value.strip() for key, value in headers.items()}  # a token's file may end with a line's end


_known: dict[object, Access] = {}


def find(kubeconfig: str | None, context: str | None) -> Access:
    """The server to talk to: of a kubeconfig (the one given, $KUBECONFIG, ~/.kube/config), or of this pod.

    Raises `ClusterError`.
    """
    if kubeconfig:
        files = [Path(kubeconfig).expanduser()]
        if not files[0].is_file():
            raise ClusterError(f"{kubeconfig}: there is no kubeconfig here; {GET_ONE}")
    elif named := os.environ.get("KUBECONFIG"):
        files = [path for word in named.split(os.pathsep) if word and (path := Path(word)).is_file()]
        if not files:
            raise ClusterError(f"$KUBECONFIG names {named}, which is not there; {GET_ONE}")
    else:
        files = [path for path in [Path("~/.kube/config").expanduser()] if path.is_file()]
    if not files and not (os.environ.get("KUBERNETES_SERVICE_HOST") and (ACCOUNT / "token").is_file()):
        raise ClusterError(f"there is no kubeconfig: neither $KUBECONFIG nor ~/.kube/config; {GET_ONE}")
    # Kept for the life of the process, and with it what a login command answers: it may take a second each time.
    key = (tuple((file.resolve(), file.stat().st_mtime_ns) for file in files), context)
    if key not in _known:
        _known[key] = Access(files, context)
    return _known[key]


def _entry(merged: Mapping[str, Any], kind: str, name: object) -> dict[str, Any]:
    """An entry of a merged kubeconfig; empty where it has none of this name."""
    return next((node.value.get(kind) or {} for node in merged[f"{kind}s"] if node.value.get("name") == name), {})


@contextlib.contextmanager
def _told(what: str, move: str) -> Iterator[None]:
    """Any error of the library as ours: a file, and all that it names, can be wrong in as many ways as it has words."""
    try:
        yield
    except ClusterError:
        raise
    except Exception as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        raise ClusterError(f"{what} ({problem[:200]}); {move}") from error


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """What is logged meanwhile, filled in at the end.

    The library goes on without credentials when a login command fails, and only logs why.
    """
    heard: list[str] = []
    handler, root = logging.handlers.BufferingHandler(capacity=1000), logging.getLogger()
    root.addHandler(handler)
    try:
        yield heard
    finally:
        root.removeHandler(handler)
        heard += [record.getMessage() for record in handler.buffer if record.module == "kube_config"]


def _within(limit_s: float, work: Callable[[], None]) -> bool:
    """Whether `work` ended in time; what it raises is raised. Otherwise the commands that it ran are ended."""
    done: Future[None] = Future()

    def act() -> None:
        try:
            work()
            done.set_result(None)
        except BaseException as error:  # raised where it is waited for
            done.set_exception(error)

    worker = threading.Thread(target=act, name="login", daemon=True)
    worker.start()
    try:
        done.exception(limit_s)
    except TimeoutError:
        return False
    finally:
        if not done.done():  # late, or Ctrl-C
            _kill_children(Path(f"/proc/self/task/{worker.native_id}"))
            worker.join(STOPPED_S)  # what the library says of it is heard by nobody then
    done.result()
    return True


def _kill_children(task: Path) -> None:
    """Kill what a thread has started, and what that has started: a login command is often a script around another."""
    with contextlib.suppress(OSError):
        for word in (task / "children").read_text().split():
            for below in Path(f"/proc/{word}/task").glob("*"):
                _kill_children(below)
            with contextlib.suppress(OSError):
                os.kill(int(word), signal.SIGKILL)
