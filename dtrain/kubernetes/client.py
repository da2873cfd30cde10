"""The Kubernetes API as dtrain asks it: objects as they are sent, retries that end, streams that can be cut.

The wire is the official client's, whose classes of objects are not used. Every failure is a `ClusterError` with the
next move; nothing here waits for ever.
"""

import contextlib
import json
import random
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

from dtrain.errors import ClusterError
from dtrain.kubernetes import errors, kubeconfig
from dtrain.kubernetes.errors import Asked, Refused

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
PATIENCE_S = 15.0
"""Longest time that a request is repeated: throttled, cut, or answered by a server in trouble."""
REPEATED_500 = 2
"""A server's own error is often a refusal of some webhook: it is repeated no more than this."""
PAGE = 500
"""Objects in one answer, as kubectl asks for them."""
TRIES_OF_A_LIST = 3
FIELD_MANAGER = "dtrain"
Object = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of object, and where the API server keeps it."""

    name: str
    plural: str
    group: str = ""
    version: str = "v1"
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None, part: str = "") -> str:
        words = ["/apis", self.group, self.version] if self.group else ["/api", self.version]
        words += ["namespaces", quote(namespace or "", safe="")] if self.namespaced else []
        words += [self.plural, *([quote(name, safe=":")] if name else []), *([part] if part else [])]
        return "/".join(words)


RAY_JOB = Kind("RayJob", "rayjobs", "ray.io")
RAY_CLUSTER = Kind("RayCluster", "rayclusters", "ray.io")
POD = Kind("Pod", "pods")
EVENT = Kind("Event", "events")
NETWORK_POLICY = Kind("NetworkPolicy", "networkpolicies", "networking.k8s.io")
KINDS = {kind.name: kind for kind in (RAY_JOB, RAY_CLUSTER, POD, NETWORK_POLICY,
         Kind("Secret", "secrets"), Kind("ConfigMap", "configmaps"))}  # fmt: skip
"""What dtrain sends, by kind."""


@dataclass
class Answer:
    status: int
    body: bytes
    content_type: str
    warnings: list[str] = field(default_factory=list)
    retry_after_s: float | None = None

    def json(self) -> Object:
        found = json.loads(self.body)
        return found if isinstance(found, dict) else {"items": found}


class Client:
    """Connections to one server, for one thread."""

    def __init__(self, access: kubeconfig.Access, patience_s: float = PATIENCE_S) -> None:
        self.access = access
        self._patience_s = patience_s
        self._api: Any = None
        self.warnings: list[str] = []
        """What the server warned of, in all answers so far."""
        self.num_repeated = 0
        """Requests that were sent again: the first may have been carried out."""

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._api is not None:
            self._api.rest_client.pool_manager.clear()
            self._api = None

    # -- objects ---------------------------------------------------------------------------------------------

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        """None when there is none. Raises `ClusterError`."""
        try:
            return self.ask("GET", kind.path(namespace, name)).json()
        except Refused as refusal:
            if refusal.code == 404 and refusal.reason == "NotFound":
                return None
            raise

    def create(self, kind: Kind, namespace: str | None, made: Object, *, is_trial: bool = False) -> Object:
        """Raises `Refused` with code 409 where the name is taken, perhaps by this very request tried twice."""
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"}
        query |= {"dryRun": "All"} if is_trial else {}
        return self.ask("POST", kind.path(namespace), query, made).json()

    def delete(self, kind: Kind, namespace: str | None, name: str, uid: str | None = None) -> bool:
        """False when it is not there. Raises `Refused` with code 409 where it is another than the one with this uid."""
        conditions = {"preconditions": {"uid": uid}} if uid else {}
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background", **conditions}
        try:
            self.ask("DELETE", kind.path(namespace, name), None, body)
        except Refused as refusal:
            if refusal.code == 404 and refusal.reason == "NotFound":
                return False
            raise
        return True

    def patch(self, kind: Kind, namespace: str | None, name: str, operations: list[Object]) -> Object:
        """Change an object by a JSON patch."""
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"}
        path = kind.path(namespace, name)
        return self.ask("PATCH", path, query, operations, content_type="application/json-patch+json").json()

    def list(self, kind: Kind, namespace: str | None, labels: str = "", fields: str = "") -> tuple[list[Object], str]:
        """All objects, in pages, and the version of the list, from which a watch can go on. Raises `ClusterError`."""
        chosen = {"labelSelector": labels, "fieldSelector": fields}
        query = {"limit": str(PAGE), **{key: value for key, value in chosen.items() if value}}
        for number in range(TRIES_OF_A_LIST):
            items: list[Object] = []
            token = ""
            try:
                while True:
                    words = {**query, "continue": token} if token else query
                    page = self.ask("GET", kind.path(namespace), words).json()
                    items += page.get("items") or ()
                    token = page["metadata"].get("continue") or ""
                    if not token:
                        return items, str(page["metadata"].get("resourceVersion") or "")
            except Refused as refusal:  # the pages were read too slowly: they are of one moment, and it is forgotten
                if refusal.code != 410 or number == TRIES_OF_A_LIST - 1:
                    raise
        raise AssertionError

    # -- requests --------------------------------------------------------------------------------------------

    def ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request, repeated while the server is in trouble or the connection is cut, for a bounded time.

        Raises `Refused` for an answer that is not 2xx, `ClusterError` when there is no answer.
        """
        data = None if body is None else json.dumps(body).encode()
        sent = {"Content-Type": content_type} if data else {}
        deadline, number, was_renewed = time.monotonic() + self._patience_s, 0, False
        while True:
            number += 1
            try:
                answer = self._once(method, path, query, data, {**sent, **(headers or {})})
            except OSError as trouble:
                wait_s = _pause(number)
                if not _is_passing(trouble, number) or time.monotonic() + wait_s > deadline:
                    raise self.unreachable(trouble) from trouble
                self.num_repeated += 1
                time.sleep(wait_s)
                continue
            if answer.status < 300:
                self.warnings += answer.warnings
                return answer
            if answer.status == 401 and not was_renewed:
                self.access.renew()
                self.close()  # a certificate may be among what is renewed
                was_renewed = True
                continue
            wait_s = max(_pause(number), answer.retry_after_s or 0.0)  # a server that says 0 is not asked without end
            is_beaten = method == "POST" and _is_beaten(answer)
            if not (is_beaten or _is_trouble(answer.status, number)) or time.monotonic() + wait_s > deadline:
                kind = str(body.get("kind", "")) if isinstance(body, dict) else ""
                asked = Asked(self.access.source, self.access.login, method, path, kind)
                raise errors.refused(asked, answer.status, answer.body, answer.content_type)
            self.num_repeated += not is_beaten  # nothing was carried out, and that is known
            time.sleep(wait_s)

    def _once(
        self, method: str, path: str, query: Mapping[str, str] | None, data: bytes | None, headers: Mapping[str, str]
    ) -> Answer:
        response = self._request(method, path, query, data, headers, READ_TIMEOUT_S)
        found = Answer(response.status, response.data, response.headers.get("Content-Type") or "")
        found.warnings = [text for value in response.headers.getlist("Warning") if (text := _warning(value))]
        with contextlib.suppress(TypeError, ValueError):
            found.retry_after_s = min(float(response.headers.get("Retry-After") or ""), self._patience_s)
        return found

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        data: bytes | None,
        headers: Mapping[str, str],
        read_timeout_s: float,
        *,
        is_stream: bool = False,
    ) -> Any:
        """urllib3's response, of a stream one that is yet to be read. Raises `OSError` where there is none."""
        import urllib3

        if self._api is None:
            self._api = self.access.connect()
        with _as_os_error():
            return self._api.rest_client.pool_manager.request(
                method,
                self.access.server + path + (f"?{urlencode(query)}" if query else ""),
                body=data,
                headers={**self.access.headers(self._api), **headers},
                timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=read_timeout_s),
                preload_content=not is_stream,
            )

    def unreachable(self, trouble: BaseException) -> ClusterError:
        """The error for a request that had no answer."""
        source, host = self.access.source, self.access.host
        if isinstance(trouble, ssl.SSLCertVerificationError):
            return ClusterError(
                f"{source}: {host} shows a certificate that is not trusted ({trouble.verify_message}); is this the"
                " right cluster? get a new kubeconfig from whoever runs it"
            )
        if isinstance(trouble, ssl.SSLError):
            return ClusterError(
                f"{source}: {host} speaks no TLS as expected ({trouble.reason}); check its server address,"
                " and the certificates in the kubeconfig"
            )
        if isinstance(trouble, socket.gaierror):
            text = "its name is unknown here; check the network or VPN, or get a new kubeconfig"
        elif isinstance(trouble, ConnectionRefusedError):
            text = "nothing answers at this address; check that the cluster runs, or get a new kubeconfig"
        elif isinstance(trouble, TimeoutError):
            text = "no answer in time; check the network, VPN or firewall"
        else:
            text = f"the connection is cut ({trouble or type(trouble).__name__}); check the network, then try again"
        return ClusterError(f"{source}: the cluster at {host} cannot be reached: {text}")

    # -- streams ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def stream(self, path: str, query: Mapping[str, str], silence_s: float) -> Iterator[Iterator[bytes]]:
        """The lines of an answer as they come, over a connection of its own.

        Reading raises `OSError` when the connection is cut, or silent for longer than `silence_s`.
        Raises `Refused` for an answer that is not 2xx.
        """
        response = self._request("GET", path, query, None, {}, silence_s, is_stream=True)
        try:
            if response.status >= 300:
                asked = Asked(self.access.source, self.access.login, "GET", path)
                with _as_os_error():
                    body = response.data
                raise errors.refused(asked, response.status, body, response.headers.get("Content-Type") or "")
            yield _lines(response)
        finally:
            response.close()


def _lines(response: Any) -> Iterator[bytes]:
    """Whole lines, the last one even without its end. A body that ends before it should raises `OSError`."""
    rest = b""
    with _as_os_error():
        for data in response.stream(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield line + b"\n"
    if rest:
        yield rest


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """An error of urllib3 as that of the system for which it stands."""
    import urllib3

    try:
        yield
    except urllib3.exceptions.HTTPError as error:
        raise _below(error) from error


def _below(error: BaseException) -> OSError:
    for inner in (*error.args, error.__cause__, error.__context__):
        if isinstance(inner, OSError):
            return inner
        if isinstance(inner, Exception):
            return _below(inner)
    return ConnectionError(str(error) or type(error).__name__)


def _is_passing(trouble: BaseException, number: int) -> bool:
    """Whether the same request may well be answered in a moment."""
    if isinstance(trouble, ssl.SSLError):
        return isinstance(trouble, ssl.SSLEOFError) and number < 3  # cut; any other one stays as it is
    if isinstance(trouble, socket.gaierror | TimeoutError):
        return False
    return number < (4 if isinstance(trouble, ConnectionRefusedError) else 6)


def _is_trouble(status: int, number: int) -> bool:
    return status in (429, 502, 503, 504) or (status == 500 and number <= REPEATED_500)


def _is_beaten(answer: Answer) -> bool:
    """Whether something was not made as others made something of the same quota meanwhile: no name is taken by that."""
    with contextlib.suppress(ValueError):
        return answer.status == 409 and answer.json().get("reason") == "Conflict"
    return False


def _pause(number: int) -> float:
    """Seconds before the next try: 0.1, 0.2, 0.4, ... up to 4, half of it by chance, so that clients drift apart."""
    return float(min(4.0, 0.1 * 2 ** (number - 1))) * random.uniform(0.5, 1.0)  # noqa: S311 -- nothing secret


def _warning(header: str) -> str:
    """The text of a `Warning` header: `299 - "unknown field \\"spec.x\\""`."""
    parts = header.split('"', 1)
    return parts[1].rsplit('"', 1)[0].replace('\\"', '"') if len(parts) == 2 else header


def of(options: Any) -> Client:
    """The client for a cluster file's options. Raises `ClusterError` when there is no kubeconfig to go by."""
    return Client(kubeconfig.find(options.kubeconfig, options.context))
