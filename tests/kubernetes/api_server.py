"""A Kubernetes API server on loopback: real HTTP, in threads of this process, made of the standard library.

It keeps objects as a real one does (versions, conflicts, watches, pages, dry runs, finalizers, owners), refuses in the
words that were recorded from a real one, and fails on demand. No controller runs in it: who creates pods, or moves a
RayJob along, is whoever calls `put`, `set_status`, `event` and `log` (see `listen`, and replay.py).
"""

import contextlib
import json
import re
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self

import api_refusals as refuse
from api_http import Handler
from api_resources import Catalogue, Resource
from api_store import Object, Store, merge, selector
from api_tls import Authority

Rule = tuple[str, str, str]
"""Verb, group and resource (`pods/log` for a part of one); `*` for any."""
Listener = Callable[[str, Object], None]
LISTEN_POLL_S = 0.1


@dataclass(frozen=True)
class Request:
    """What somebody asked."""

    method: str
    path: str
    query: Mapping[str, str]
    agent: str


@dataclass
class Fault:
    """What goes wrong the next `times` a matching request comes."""

    path: str = ".*"
    method: str | None = None
    status: int | None = None
    message: str = ""
    reason: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: Literal["before", "after", "middle"] | None = None
    """The connection is closed: before anything is done, after it was, or half way through the answer."""
    delay_s: float = 0.0
    times: int = 1
    skip: int = 0
    """So many matching requests pass first."""


@dataclass(frozen=True)
class Line:
    at: str
    text: bytes
    number: int


class ApiServer:
    """The server; `with ApiServer() as api:` starts and ends it."""

    def __init__(
        self,
        namespaces: Sequence[str] = ("default", "dtrain"),
        *,
        tls: bool = True,
        ray: bool = True,
        kueue: bool = False,
    ) -> None:
        self.catalogue = Catalogue(ray=ray, kueue=kueue)
        self.store = Store(self.catalogue)
        self.requests: list[Request] = []
        self.under_way: list[tuple[str, str]] = []
        """Requests that are not answered yet: a watch that nobody closed is among them."""
        self.token = "admin-" + secrets.token_hex(8)
        self.tokens = {self.token: "admin"}
        self.rules: dict[str, tuple[list[Rule], frozenset[str] | None]] = {"admin": ([("*", "*", "*")], None)}
        self.logs: dict[tuple[str, str, str], list[Line]] = {}
        self.proxies: dict[tuple[str, str, str], str] = {}
        self.bookmark_every_s = 0.5
        self.watch_generation = 0
        self.closing = threading.Event()
        self._ended_logs: set[tuple[str, str]] = set()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        handler = type("BoundHandler", (Handler,), {"api": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.authority = Authority() if tls else None
        if self.authority:
            context = self.authority.server_context()
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.server_address[1]}"
        for name in namespaces:
            self.put({"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": name}})

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="api-server")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        with self.store.changed:
            self.store.changed.notify_all()
        self._server.shutdown()
        self._server.hang_up()
        self._server.server_close()
        self._thread.join()

    # -- who may ask -----------------------------------------------------------------------------------------

    def user(self, name: str, rules: Sequence[Rule] = (), *, namespaces: Sequence[str] | None = ("dtrain",)) -> str:
        """Somebody with a token who may do no more than this, in these namespaces; None: in the cluster."""
        token = f"{name}-{secrets.token_hex(8)}"
        self.tokens[token] = name
        self.rules[name] = (list(rules), None if namespaces is None else frozenset(namespaces))
        return token

    def expire(self, token: str) -> None:
        """From now on this token is nobody's."""
        del self.tokens[token]

    def allows(self, user: str, verb: str, resource: Resource, part: str, namespace: str | None) -> bool:
        rules, namespaces = self.rules.get(user, ([], None))
        if namespaces is not None and namespace not in namespaces:
            return False
        what = f"{resource.plural}/{part}" if part else resource.plural
        asked = (verb, resource.group, what)
        return any(all(has in ("*", wants) for has, wants in zip(rule, asked, strict=True)) for rule in rules)

    def kubeconfig(self, path: Path, *, namespace: str = "dtrain", context: str = "loopback", **user: Any) -> Path:
        """A file that kubectl and dtrain read; `user` (`token=...`, `exec=...`) in place of the administrator's."""
        cluster: dict[str, Any] = {"server": self.url}
        if self.authority:
            cluster["certificate-authority-data"] = self.authority.certificate_base64
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": context,
            "clusters": [{"name": "loopback", "cluster": cluster}],
            "users": [{"name": "somebody", "user": user or {"token": self.token}}],
            "contexts": [
                {"name": context, "context": {"cluster": "loopback", "user": "somebody", "namespace": namespace}}
            ],
        }
        path.write_text(json.dumps(config))
        path.chmod(0o600)
        return path

    # -- objects, as operators, schedulers and kubelets change them ------------------------------------------

    def put(self, given: Object) -> Object:
        """Create or replace, status and all; nothing is checked."""
        return self.store.put(self.catalogue.of_kind(given["kind"]), given)

    def get(self, kind: str, name: str, namespace: str = "dtrain") -> Object | None:
        try:
            return self.store.read(self.catalogue.of_kind(kind), namespace, name)
        except refuse.Refusal:
            return None

    def list(
        self, kind: str, namespace: str | None = "dtrain", labels: Mapping[str, str] | None = None
    ) -> list[Object]:
        words = ",".join(f"{key}={value}" for key, value in (labels or {}).items())
        return self.store.all(self.catalogue.of_kind(kind), namespace, selector(words, ""))

    def set_status(self, kind: str, name: str, status: Mapping[str, Any], namespace: str = "dtrain") -> Object:
        """Replace an object's status. Raises `Refusal` when there is no such object."""
        resource = self.catalogue.of_kind(kind)
        with self.store.changed:
            made = self.store.read(resource, namespace, name)
            return self.store.put(resource, {**made, "status": dict(status)})

    def patch(self, kind: str, name: str, change: Mapping[str, Any], namespace: str = "dtrain") -> Object:
        """A merge patch; with `{"metadata": {"finalizers": []}}` a deletion that waits for it is done."""
        resource = self.catalogue.of_kind(kind)
        with self.store.changed:
            return self.store.put(resource, merge(self.store.read(resource, namespace, name), change))

    def remove(self, kind: str, name: str, namespace: str = "dtrain") -> bool:
        try:
            self.store.delete(self.catalogue.of_kind(kind), namespace, name)
        except refuse.Refusal:
            return False
        return True

    def event(self, about: Object, reason: str, message: str, kind: str = "Normal") -> Object:
        """An Event, with its times where a real operator puts them."""
        metadata = about["metadata"]
        named = {key: metadata.get(key) for key in ("name", "namespace", "uid")}
        at = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        return self.put(
            {
                "kind": "Event",
                "apiVersion": "v1",
                "metadata": {"name": f"{metadata['name']}.{secrets.token_hex(8)}", "namespace": metadata["namespace"]},
                "involvedObject": {"kind": about["kind"], **named},
                "type": kind,
                "reason": reason,
                "message": message,
                "eventTime": at,
                "firstTimestamp": None,
                "lastTimestamp": None,
            }
        )

    def log(self, pod: str, data: bytes, namespace: str = "dtrain", container: str = "") -> None:
        """Append to what a pod's container has printed; of its first one by default. The pod must be there."""
        with self.store.changed:
            made = self.get("Pod", pod, namespace)
            assert made is not None, pod
            name = container or made["spec"]["containers"][0]["name"]
            lines = self.logs.setdefault((namespace, pod, name), [])
            for text in data.splitlines(keepends=True):
                moment = time.time_ns()
                at = datetime.fromtimestamp(moment // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%S")
                lines.append(Line(f"{at}.{moment % 10**9:09d}Z", text, len(lines) + 1))
            self.store.changed.notify_all()

    def end_log(self, pod: str, namespace: str = "dtrain") -> None:
        """The pod's containers have ended: who follows them has read all."""
        with self.store.changed:
            self._ended_logs.add((namespace, pod))
            self.store.changed.notify_all()

    def is_log_ended(self, key: tuple[str, str, str], uid: str) -> bool:
        made = self.get("Pod", key[1], key[0])
        return key[:2] in self._ended_logs or made is None or made["metadata"]["uid"] != uid

    def proxy(self, service: str, port: int | str, address: str, namespace: str = "dtrain") -> None:
        """What is asked of a service through the API server is asked of this address."""
        self.proxies[namespace, service, str(port)] = address

    @contextlib.contextmanager
    def listen(self, kind: str, callback: Listener) -> Iterator[None]:
        """Call back for each object there is (ADDED) and each change, one after the other, in a thread of its own.

        An error of the callback ends the listening and is raised at the end of the block.
        """
        resource, done, errors = self.catalogue.of_kind(kind), threading.Event(), list[BaseException]()

        def run() -> None:
            with self.store.changed:
                since = self.store.version
                found = [{"type": "ADDED", "object": made} for made in self.store.all(resource, None)]
            try:
                while True:
                    for event in found:
                        callback(str(event["type"]), dict(event["object"]))
                    with self.store.changed:
                        since = max(since, self.store.oldest)
                        found = list(self.store.changes(resource, None, lambda _: True, since))
                        since = self.store.version
                        if not found:
                            if done.is_set():
                                return
                            self.store.changed.wait(LISTEN_POLL_S)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name=f"operator of {kind}")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        if errors:
            raise errors[0]

    # -- what goes wrong -------------------------------------------------------------------------------------

    def fail(self, path: str = ".*", **words: Any) -> Fault:
        """Let the next requests to a path (a regular expression) fail; see `Fault`."""
        fault = Fault(path, **words)
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        with self._lock:
            self._faults.clear()

    def drop_watches(self) -> None:
        """Cut every watch and every log that is followed."""
        with self.store.changed:
            self.watch_generation += 1
            self.store.changed.notify_all()

    def compact(self) -> None:
        """Forget old resource versions: a watch or a list that continues from one is answered 410."""
        self.store.compact()

    def check_quota(self, resource: Resource, namespace: str | None, made: Object) -> None:
        """Counts of objects (`count/rayjobs.ray.io`) against the namespace's quotas. Raises `Refusal`."""
        key = f"count/{resource.qualified}"
        for quota in self.list("ResourceQuota", namespace):
            limited = quota.get("spec", {}).get("hard", {}).get(key)
            used = len(self.store.all(resource, namespace))
            if limited is not None and used >= int(limited):
                name = made.get("metadata", {}).get("name", "")
                raise refuse.over_quota(resource, name, quota["metadata"]["name"], key, str(used), limited)

    def begin(self, method: str, path: str, query: Mapping[str, str], headers: Any) -> Fault | None:
        """Note a request; what it is to suffer, if anything."""
        with self._lock:
            self.requests.append(Request(method, path, query, headers.get("User-Agent") or ""))
            self.under_way.append((method, path))
            for fault in self._faults:
                if fault.method in (None, method) and re.search(fault.path, path) and fault.times:
                    if fault.skip:
                        fault.skip -= 1
                        return None
                    fault.times -= 1
                    return fault
        return None

    def end(self, method: str, path: str) -> None:
        with self._lock:
            self.under_way.remove((method, path))


class _Server(ThreadingHTTPServer):
    """Ends every connection when it is closed, so that no thread is left behind."""

    request_queue_size = 128
    daemon_threads = False

    def __init__(self, *words: Any) -> None:
        self._open: set[Any] = set()
        super().__init__(*words)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        import sys

        if not isinstance(sys.exception(), ssl.SSLError | OSError):  # a client that does not trust us, or hung up
            super().handle_error(request, client_address)

    def hang_up(self) -> None:
        for request in list(self._open):
            with contextlib.suppress(OSError):
                request.shutdown(2)
