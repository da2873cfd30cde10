"""A small client of the Kubernetes API: JSON over one connection, retries that end, streams that can be cut.

Made of the standard library: importing the official client takes longer than a whole verb. Every failure is a
`ClusterError` with the next move; nothing here waits for ever.
"""

import contextlib
import http.client
import json
import random
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from dtrain import __version__
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
_TROUBLE = (ConnectionError, TimeoutError, http.client.HTTPException, ssl.SSLError, OSError)


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
    """One connection, for one thread."""

    def __init__(self, access: kubeconfig.Access, patience_s: float = PATIENCE_S) -> None:
        self.access = access
        self._patience_s = patience_s
        self._connection: http.client.HTTPConnection | None = None
        self.warnings: list[str] = []
        """What the server warned of, in all answers so far."""
        self.num_repeated = 0
        """Requests that were sent again: the first may have been carried out."""

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

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
            except _TROUBLE as trouble:
                self.close()
                wait_s = _pause(number)
                if not _is_passing(trouble, number) or time.monotonic() + wait_s > deadline:
                    raise self.unreachable(trouble) from trouble
                self.num_repeated += 1
                time.sleep(wait_s)
                continue
            if answer.status < 300:
                self.warnings += answer.warnings
                return answer
            if answer.status == 401 and not was_renewed and self.access.renew():
                was_renewed = True
                self.close()  # a certificate may be among what is renewed
                continue
            wait_s = answer.retry_after_s if answer.retry_after_s is not None else _pause(number)
            if not _is_trouble(answer.status, number) or time.monotonic() + wait_s > deadline:
                kind = str(body.get("kind", "")) if isinstance(body, dict) else ""
                asked = Asked(self.access.source, self.access.login, method, path, kind)
                raise errors.refused(asked, answer.status, answer.body, answer.content_type)
            self.num_repeated += 1
            time.sleep(wait_s)

    def _once(
        self, method: str, path: str, query: Mapping[str, str] | None, data: bytes | None, headers: Mapping[str, str]
    ) -> Answer:
        if self._connection is None or self._connection.sock is None:  # None: the server said it would close it
            self._connection = self._connect(READ_TIMEOUT_S)
        self._send(self._connection, method, path, query, data, headers)
        response = self._connection.getresponse()
        found = Answer(response.status, response.read(), response.getheader("Content-Type") or "")
        found.warnings = [text for value in response.headers.get_all("Warning") or () if (text := _warning(value))]
        with contextlib.suppress(TypeError, ValueError):
            found.retry_after_s = min(float(response.getheader("Retry-After") or ""), self._patience_s)
        return found

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        data: bytes | None,
        headers: Mapping[str, str],
    ) -> None:
        known = {
            "Accept": "application/json",
            "User-Agent": f"dtrain/{__version__}",
            **self.access.headers(),
            **headers,
        }
        base = urlsplit(self.access.server).path
        connection.request(method, base + path + (f"?{urlencode(query)}" if query else ""), data, known)

    def _connect(self, read_timeout_s: float) -> http.client.HTTPConnection:
        """A connection that is open. Raises `OSError` when it cannot be, `ClusterError` for a proxy of another kind."""
        access, at = self.access, urlsplit(self.access.server)
        host, port = at.hostname or "", at.port or (443 if access.is_tls else 80)
        proxy = _proxy(access)
        target = (proxy.hostname or "", proxy.port or 80) if proxy else (host, port)
        raw = socket.create_connection(target, CONNECT_TIMEOUT_S)
        try:
            if proxy:
                _tunnel(raw, host, port)
            if access.is_tls:
                raw = access.tls().wrap_socket(raw, server_hostname=access.server_name)
            raw.settimeout(read_timeout_s)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            raw.close()
            raise
        connection = http.client.HTTPConnection(at.netloc)
        connection.auto_open = 0
        connection.sock = raw
        return connection

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
                f"{source}: {host} speaks no TLS as expected ({trouble.reason}); check its server address"
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

        Reading raises `OSError` or `HTTPException` when the connection is cut, or silent for longer than `silence_s`.
        Raises `Refused` for an answer that is not 2xx.
        """
        connection = self._connect(silence_s)
        try:
            self._send(connection, "GET", path, query, None, {})
            with contextlib.closing(connection.getresponse()) as response:  # it holds the socket open, too
                if response.status >= 300:
                    asked = Asked(self.access.source, self.access.login, "GET", path)
                    kind = response.getheader("Content-Type") or ""
                    raise errors.refused(asked, response.status, response.read(), kind)
                yield _lines(response)
        finally:
            connection.close()


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Whole lines, the last one even without its end. A body that ends before it should raises `HTTPException`."""
    rest = b""
    while data := response.read1(1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest


def _is_passing(trouble: BaseException, number: int) -> bool:
    """Whether the same request may well be answered in a moment."""
    if isinstance(trouble, ssl.SSLError):
        return isinstance(trouble, ssl.SSLEOFError) and number < 3  # cut; any other one stays as it is
    if isinstance(trouble, socket.gaierror | TimeoutError):
        return False
    return number < (4 if isinstance(trouble, ConnectionRefusedError) else 6)


def _is_trouble(status: int, number: int) -> bool:
    return status in (429, 502, 503, 504) or (status == 500 and number <= REPEATED_500)


def _pause(number: int) -> float:
    """Seconds before the next try: 0.1, 0.2, 0.4, ... up to 4, half of it by chance, so that clients drift apart."""
    return float(min(4.0, 0.1 * 2 ** (number - 1))) * random.uniform(0.5, 1.0)  # noqa: S311 -- nothing secret


def _warning(header: str) -> str:
    """The text of a `Warning` header: `299 - "unknown field \\"spec.x\\""`."""
    parts = header.split('"', 1)
    return parts[1].rsplit('"', 1)[0].replace('\\"', '"') if len(parts) == 2 else header


def _proxy(access: kubeconfig.Access) -> Any:
    """The address of the proxy on the way there: the kubeconfig's, or the environment's as everywhere."""
    import urllib.request

    host = urlsplit(access.server).hostname or ""
    named = access.proxy or (
        None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get("https" if access.is_tls else "")
    )
    if not named:
        return None
    proxy = urlsplit(named)
    if proxy.scheme != "http":
        raise ClusterError(
            f"{access.source}: the proxy {named} is not of the http:// kind; set another one as proxy-url"
        )
    return proxy


def _tunnel(raw: socket.socket, host: str, port: int) -> None:
    raw.sendall(f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        data = raw.recv(1)
        if not data:
            break
        answer += data
    words = answer.split(b" ", 2)
    if len(words) < 2 or words[1] != b"200":
        raise ConnectionError(
            f"the proxy answers {answer.splitlines()[0].decode(errors='replace') if answer else ''!r}"
        )


def of(options: Any) -> Client:
    """The client for a cluster file's options. Raises `ClusterError` when there is no kubeconfig to go by."""
    return Client(kubeconfig.find(options.kubeconfig, options.context))
