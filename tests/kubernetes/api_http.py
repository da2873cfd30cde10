"""The HTTP side of the loopback API server: from a request to the store, and back in a real server's words."""

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import api_refusals as refuse
import api_schema
import yaml
from api_refusals import Refusal
from api_resources import REVIEW, Resource
from api_store import deadline, merge, now, operated, selector

if TYPE_CHECKING:
    from api_server import ApiServer, Fault

NOT_FOUND = b"404 page not found\n"
POLL_S = 0.2
"""How often a stream looks whether the server is closing."""
JSON_TYPES = ("application/json", "application/yaml", "application/apply-patch+yaml", "application/apply-patch+json",
              "application/merge-patch+json", "application/strategic-merge-patch+json")  # fmt: skip


@dataclass(frozen=True)
class Target:
    """What a request is about."""

    resource: Resource
    namespace: str | None = None
    name: str | None = None
    part: str = ""
    """A subresource: `status`, `log`, `proxy`."""
    rest: str = ""
    """Behind `proxy/`."""


class NoAnswer(Exception):
    """The connection is to be cut."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    api: "ApiServer"

    # -- one request -----------------------------------------------------------------------------------------

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError, ValueError):
            self.close_connection = True  # whoever asked has hung up

    def _handle(self) -> None:
        split = urlsplit(self.path)
        self.query = dict(parse_qsl(split.query, keep_blank_values=True))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.generation = self.api.watch_generation  # whoever sees this request noted may cut it from then on
        fault = self.api.begin(self.command, split.path, self.query, self.headers)
        self.cut = fault.cut if fault else None
        try:
            self._suffer(fault)
            user = self._user()
            self._route(split.path, user)
        except Refusal as refusal:
            self._json(refusal.code, refusal.body, refusal.headers)
        except NoAnswer:
            self._hang_up()
        finally:
            self.api.end(self.command, split.path)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815 -- http.server's names

    def _suffer(self, fault: "Fault | None") -> None:
        if fault is None:
            return
        if fault.delay_s:
            self.api.closing.wait(fault.delay_s)
        if fault.cut == "before":
            raise NoAnswer
        if fault.status:
            refusal = Refusal(fault.status, fault.message or "the server is asked to fail", fault.reason)
            refusal.headers.update(fault.headers)
            raise refusal

    def _user(self) -> str:
        """Raises `Refusal` 401 for a token that nobody has; nobody at all is `system:anonymous`."""
        certificate = self.connection.getpeercert() if hasattr(self.connection, "getpeercert") else None
        if certificate:
            return next(value for part in certificate["subject"] for key, value in part if key == "commonName")
        kind, _, token = (self.headers.get("Authorization") or "").partition(" ")
        if not token:
            return "system:anonymous"
        user = self.api.tokens.get(token) if kind.lower() == "bearer" else None
        if user is None:
            raise Refusal(401, "Unauthorized")
        return user

    def _route(self, path: str, user: str) -> None:
        described = self.api.catalogue.describe(path)
        if described is not None:
            return self._json(200, described)
        target = self._target(path)
        if target is None:
            return self._send(404, NOT_FOUND, "text/plain; charset=utf-8")
        if target.resource is REVIEW:
            return self._json(201, self._review(user))
        verb = self._verb(target)
        if not self.api.allows(user, verb, target.resource, target.part, target.namespace):
            resource, namespace = target.resource, target.namespace
            raise refuse.forbidden(user, verb, resource, target.part, namespace, target.name)
        if target.part == "log":
            return self._log(target)
        if target.part == "proxy":
            return self._proxy(target)
        if verb == "watch":
            return self._watch(target)
        answers: dict[str, Callable[[Target], tuple[int, Any]]] = {
            "GET": self._read, "POST": self._create, "PUT": self._replace, "PATCH": self._patch, "DELETE": self._delete,
        }  # fmt: skip
        code, answer = answers[self.command](target)
        return self._json(code, answer)

    def _target(self, path: str) -> Target | None:
        words = path.strip("/").split("/")
        if words[0] == "api" and len(words) > 2:
            group, version, rest = "", words[1], words[2:]
        elif words[0] == "apis" and len(words) > 3:
            group, version, rest = words[1], words[2], words[3:]
        else:
            return None
        namespace = None
        if rest[0] == "namespaces" and len(rest) > 2 and rest[2] not in ("status", "finalize"):
            namespace, rest = rest[1], rest[2:]
        resource = self.api.catalogue.find(group, version, rest[0])
        name = rest[1] if len(rest) > 1 else None
        part = rest[2] if len(rest) > 2 else ""
        if resource is None or (part and part not in resource.subresources):
            return None
        return Target(resource, namespace, name, part, "/".join(rest[3:]))

    def _verb(self, target: Target) -> str:
        if self.command == "GET":
            if self.query.get("watch") in ("1", "true"):
                return "watch"
            return "get" if target.name else "list"
        if target.part == "proxy":
            return {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[self.command]
        names = {"POST": "create", "PUT": "update", "PATCH": "patch"}
        return names.get(self.command) or ("delete" if target.name else "deletecollection")

    # -- verbs -----------------------------------------------------------------------------------------------

    def _read(self, target: Target) -> tuple[int, Any]:
        store, query = self.api.store, self.query
        if target.name:
            return 200, store.read(target.resource, target.namespace, target.name)
        version = int(query["resourceVersion"]) if query.get("resourceVersion") else None
        if query.get("resourceVersionMatch") == "Exact" and version is not None and version < store.oldest:
            raise refuse.expired_list()
        matches = selector(query.get("labelSelector", ""), query.get("fieldSelector", ""))
        limit, token = int(query.get("limit") or 0), query.get("continue", "")
        return 200, store.page(target.resource, target.namespace, matches, limit, token, version)

    def _create(self, target: Target) -> tuple[int, Any]:
        given = self._object(target.resource)
        if target.resource.namespaced and given.get("metadata", {}).get("namespace") not in (None, target.namespace):
            text = "the namespace of the provided object does not match the namespace sent on the request"
            raise Refusal(400, text)
        return 201, self._admitted(target, given)

    def _admitted(self, target: Target, given: dict[str, Any]) -> dict[str, Any]:
        made, self.warnings = api_schema.admit(target.resource, given, self.query.get("fieldValidation", "Warn"))
        if "status" in target.resource.subresources:
            made.pop("status", None)
        self.api.check_quota(target.resource, target.namespace, made)
        return self.api.store.create(target.resource, target.namespace, made, is_trial=self._is_trial)

    def _replace(self, target: Target) -> tuple[int, Any]:
        given = self._object(target.resource)
        return 200, self._changed(target, given)

    def _changed(self, target: Target, given: dict[str, Any]) -> dict[str, Any]:
        name = target.name or ""
        before = self.api.store.read(target.resource, target.namespace, name)
        if target.part != "status":
            checking = self.query.get("fieldValidation", "Warn")
            status = given.get("status")
            given, self.warnings = api_schema.admit(target.resource, given, checking)
            given |= {"status": status} if status is not None else {}
            api_schema.keep_unchanged(target.resource, before, given)
        return self.api.store.replace(
            target.resource, target.namespace, name, given, target.part, is_trial=self._is_trial
        )

    def _patch(self, target: Target) -> tuple[int, Any]:
        if target.name is None:
            raise Refusal(400, "name must be provided")
        kind = self.headers.get("Content-Type", "")
        if kind == "application/json-patch+json":
            before = self.api.store.read(target.resource, target.namespace, target.name)
            return 200, self._changed(target, operated(before, json.loads(self.body)))
        patch, is_apply = self._parsed(), "apply-patch" in kind
        try:
            before = self.api.store.read(target.resource, target.namespace, target.name)
        except Refusal:
            if not is_apply:
                raise
            return 201, self._admitted(target, patch)
        return 200, self._changed(target, merge(before, patch))

    def _delete(self, target: Target) -> tuple[int, Any]:
        store, options = self.api.store, self._parsed() if self.body else {}
        if target.name:
            conditions = options.get("preconditions")
            trial = self._is_trial
            return 200, store.delete(target.resource, target.namespace, target.name, conditions, is_trial=trial)
        matches = selector(self.query.get("labelSelector", ""), self.query.get("fieldSelector", ""))
        for made in store.all(target.resource, target.namespace, matches):
            store.delete(target.resource, made["metadata"].get("namespace"), made["metadata"]["name"])
        return 200, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}

    def _review(self, user: str) -> dict[str, Any]:
        given = self._object(REVIEW)
        asked = given["spec"]["resourceAttributes"]
        found = [r for r in self.api.catalogue.resources if (r.group, r.plural) == (asked.get("group", ""),
                 asked["resource"])]  # fmt: skip
        resource = found[0] if found else Resource(asked.get("group", ""), "v1", asked["resource"], "?")
        part, namespace = asked.get("subresource", ""), asked.get("namespace")
        is_allowed = self.api.allows(user, asked["verb"], resource, part, namespace)
        return {**given, "status": {"allowed": is_allowed}}

    @property
    def _is_trial(self) -> bool:
        return self.query.get("dryRun") == "All"

    def _object(self, resource: Resource) -> dict[str, Any]:
        if self.headers.get("Content-Type", "").partition(";")[0] not in JSON_TYPES:
            text = "the body of the request was in an unknown format - accepted media types include: "
            raise Refusal(415, text + "application/json, application/yaml, application/vnd.kubernetes.protobuf")
        try:
            return self._parsed()
        except (ValueError, yaml.YAMLError):
            raise Refusal(400, f"the object provided is unrecognized (must be of type {resource.kind}): couldn't get"
                          f" version/kind; json parse error: ({self.body[:100].decode(errors='replace')})"
                          ) from None  # fmt: skip

    def _parsed(self) -> dict[str, Any]:
        is_yaml = self.headers.get("Content-Type", "").startswith("application/yaml")
        parsed = yaml.safe_load(self.body) if is_yaml or not self.body.lstrip().startswith(b"{") else None
        made = parsed if parsed is not None else json.loads(self.body or b"{}")
        if not isinstance(made, dict):
            raise ValueError("not an object")
        return made

    # -- streams ---------------------------------------------------------------------------------------------

    def _watch(self, target: Target) -> None:
        store, query = self.api.store, self.query
        labels, fields = query.get("labelSelector", ""), query.get("fieldSelector", "")
        matches = selector(labels, fields if not target.name else f"metadata.name={target.name}")
        given = query.get("resourceVersion") or "0"
        left = deadline(float(query.get("timeoutSeconds") or 300))
        bookmarks = query.get("allowWatchBookmarks") in ("1", "true")
        self._begin_stream("application/json")
        since, told = int(given), time.monotonic()
        if given == "0":
            with store.changed:
                since, found = store.version, store.all(target.resource, target.namespace, matches)
            for made in found:
                self._line({"type": "ADDED", "object": made})
            if query.get("sendInitialEvents") == "true":  # a list as a stream, whose end is marked
                mark = {"resourceVersion": str(since), "annotations": {"k8s.io/initial-events-end": "true"}}
                kind = {"kind": target.resource.kind, "apiVersion": target.resource.api_version}
                self._line({"type": "BOOKMARK", "object": {**kind, "metadata": mark}})
        while left() > 0 and not self.api.closing.is_set() and self.generation == self.api.watch_generation:
            with store.changed:
                current = store.version
                try:
                    events = list(store.changes(target.resource, target.namespace, matches, since))
                except Refusal as gone:
                    self._line({"type": "ERROR", "object": gone.body})
                    break
                if not events:
                    store.changed.wait(min(POLL_S, max(0.0, left())))
            for event in events:
                self._line(event)
            since = max(since, current)
            if bookmarks and time.monotonic() - told > self.api.bookmark_every_s:
                told = time.monotonic()
                mark = {"metadata": {"resourceVersion": str(since)}}
                kind = {"kind": target.resource.kind, "apiVersion": target.resource.api_version}
                self._line({"type": "BOOKMARK", "object": {**kind, **mark}})
        if self.generation != self.api.watch_generation:
            raise NoAnswer
        self._end_stream()

    def _log(self, target: Target) -> None:
        pod = self.api.store.read(target.resource, target.namespace, target.name or "")
        containers = [container["name"] for container in pod.get("spec", {}).get("containers", [])]
        container = self.query.get("container") or (containers[0] if containers else "")
        for status in pod.get("status", {}).get("containerStatuses", ()):
            if status["name"] == container and "waiting" in status.get("state", {}):
                text = f'container "{container}" in pod "{target.name}" is waiting to start:'
                raise Refusal(400, f"{text} {status['state']['waiting'].get('reason', 'ContainerCreating')}")
        if self.query.get("previous") in ("1", "true"):
            container += " before"
            if (target.namespace or "", target.name or "", container) not in self.api.logs:
                text = f'previous terminated container "{container}" in pod "{target.name}" not found'
                raise Refusal(400, text)
        key = (target.namespace or "", target.name or "", container)
        with self.api.store.changed:
            lines = [line for line in self.api.logs.get(key, []) if line.at >= self.query.get("sinceTime", "")]
        if "tailLines" in self.query:
            lines = lines[max(0, len(lines) - int(self.query["tailLines"])) :]
        stamped = self.query.get("timestamps") in ("1", "true")
        self._begin_stream("text/plain")
        last = 0
        while True:
            for line in lines:
                self._chunk((line.at.encode() + b" " if stamped else b"") + line.text)
                last = line.number
            if self.query.get("follow") not in ("1", "true") or self.api.closing.is_set():
                break
            if self.generation != self.api.watch_generation:
                raise NoAnswer
            with self.api.store.changed:
                lines = [line for line in self.api.logs.get(key, []) if line.number > last]
                if not lines:
                    if self.api.is_log_ended(key, pod["metadata"]["uid"]):
                        break
                    self.api.store.changed.wait(POLL_S)
        self._end_stream()

    def _proxy(self, target: Target) -> None:
        name, _, port = (target.name or "").partition(":")
        address = self.api.proxies.get((target.namespace or "", name, port))
        if address is None:
            raise Refusal(503, f'no endpoints available for service "{target.name}"')
        host = urlsplit(address)
        query = urlsplit(self.path).query
        hidden = ("authorization", "host", "connection", "accept-encoding", "content-length")
        headers = {key: value for key, value in self.headers.items() if key.lower() not in hidden}
        connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=30)
        try:
            path = "/" + target.rest + (f"?{query}" if query else "")
            connection.request(self.command, path, self.body or None, headers)
            answer = connection.getresponse()
            self._send(answer.status, answer.read(), answer.getheader("Content-Type") or "text/plain")
        except OSError as error:
            text = f"error trying to reach service: dial tcp {host.netloc}: connect: {error.strerror}"
            raise Refusal(503, text) from None
        finally:
            connection.close()

    # -- bytes -----------------------------------------------------------------------------------------------

    warnings: Iterable[str] = ()

    def _json(self, code: int, body: Any, headers: dict[str, str] | None = None) -> None:
        words = [("Warning", '299 - "' + text.replace('"', '\\"') + '"') for text in self.warnings]
        self.warnings = ()
        self._send(code, json.dumps(body).encode(), "application/json", [*(headers or {}).items(), *words])

    def _send(self, code: int, body: bytes, kind: str, headers: Iterable[tuple[str, str]] = ()) -> None:
        if self.cut == "after":
            raise NoAnswer
        self.send_response(code)
        for key, value in (("Content-Type", kind), ("Content-Length", str(len(body))), *headers):
            self.send_header(key, value)
        self.end_headers()
        if self.cut == "middle":
            self.wfile.write(body[: len(body) // 2])
            raise NoAnswer
        self.wfile.write(body)

    def _begin_stream(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        if data:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

    def _line(self, value: Any) -> None:
        self._chunk(json.dumps(value).encode() + b"\n")

    def _end_stream(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def _hang_up(self) -> None:
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def version_string(self) -> str:
        return "loopback"

    def date_time_string(self, timestamp: float | None = None) -> str:
        return now() if timestamp is None else super().date_time_string(timestamp)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the standard library's name
        """Nothing: what was asked is in `ApiServer.requests`."""
