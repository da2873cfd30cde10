"""A real S3 protocol server on loopback, behind a proxy that fails exactly when it is told to.

    with served() as s3:
        s3.fail("PUT /bucket/run.json", Status(503, "SlowDown"), times=2)
        storage = s3.storage()

What is asked is matched by the start of `METHOD /bucket/key?query`.
"""

import contextlib
import functools
import http.client
import itertools
import logging
import os
import re
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dtrain.storage import Storage, at, bucket

PART = 5 << 20
"""The least that the protocol takes as a part of a larger file."""
SOMEBODY = "AWS4-HMAC-SHA256 Credential=id/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
KINDS = ("folder", "s3", *os.environ.get("DTRAIN_TEST_STORAGE", "").split())
"""A folder, the server here, and any bucket or emulator that is to be tested too: `gs://bucket abfs://container`."""
FOLDERS = (f"folder-{number}" for number in itertools.count())
BUCKETS = (f"bucket-{number}" for number in itertools.count())


@dataclass(frozen=True)
class Status:
    """Answer with an error instead of asking the server."""

    status: int
    code: str


@dataclass(frozen=True)
class Body:
    """Answer that it was done, in these words, instead of asking the server."""

    text: str


@dataclass(frozen=True)
class CutRequest:
    """Close the connection when so many bytes of the body have come."""

    after_bytes: int = 0


@dataclass(frozen=True)
class LoseAnswer:
    """Let the server do it, and close the connection instead of saying so."""


@dataclass(frozen=True)
class CutAnswer:
    """Close the connection after so many bytes of the answer's body."""

    after_bytes: int


@dataclass(frozen=True)
class Meanwhile:
    """Do something first, then go on as if nothing had been."""

    what: Callable[[], Any]


Fault = Status | Body | CutRequest | LoseAnswer | CutAnswer | Meanwhile


class Server:
    """One proxy, one bucket of its own."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.bucket = next(BUCKETS)
        self.ignores_conditions = False
        """As some stores do: what a conditional header says is not looked at."""
        self._faults: list[list[Any]] = []
        self._lock = threading.Lock()
        self._proxy = _Proxy(("127.0.0.1", 0), _Handler)
        self._proxy.owner = self
        threading.Thread(target=self._proxy.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._proxy.server_address[1]}"
        _forward("PUT", f"/{self.bucket}", {"Host": "127.0.0.1"}, b"")

    def close(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()

    def fail(self, what: str, fault: Fault, times: int = 1, skip: int = 0) -> None:
        """Let requests that begin with `what` (`{}` is the bucket) fail, after `skip` of them."""
        with self._lock:
            self._faults.append([what.format(self.bucket), fault, times, skip])

    def heal(self) -> None:
        """Nothing fails any more."""
        with self._lock:
            self._faults.clear()

    def clear(self) -> None:
        """Nothing fails, nothing was asked, and nothing is there."""
        self.heal()
        self.ignores_conditions = False
        storage = self.storage()
        for key, upload in self.uploads_left():
            _forward("DELETE", f"/{self.bucket}/{key}?uploadId={upload}", {"Authorization": SOMEBODY}, b"")
        storage.delete(entry.name for entry in storage.entries())
        self.requests.clear()

    def storage(self, folder: str = "", patience_s: float = 20.0) -> bucket.Bucket:
        place = f"s3://{self.bucket}/{folder}"
        return bucket.open(place, patience_s=patience_s, first_patience_s=patience_s, part_bytes=PART)

    def asked(self, what: str) -> list[str]:
        return [request for request in self.requests if request.startswith(what.format(self.bucket))]

    def put(self, objects: Mapping[str, bytes]) -> None:
        """As somebody else would, past the proxy."""
        connection = http.client.HTTPConnection(*_moto(), timeout=60)
        for key, data in objects.items():
            connection.request("PUT", f"/{self.bucket}/{key}", data, {"Authorization": SOMEBODY})
            answer = connection.getresponse()
            assert answer.read() == b""
            assert answer.status == 200, answer
        connection.close()

    def uploads_left(self) -> list[tuple[str, str]]:
        """Key and name of multipart uploads that were begun, and neither completed nor aborted."""
        status, _, body = _forward("GET", f"/{self.bucket}?uploads", {"Host": "127.0.0.1"}, b"")
        assert status == 200, body
        uploads = re.findall(r"<Upload>(.*?)</Upload>", body.decode(), re.DOTALL)
        return [(_in(one, "Key"), _in(one, "UploadId")) for one in uploads]

    def fault_of(self, request: str) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for row in self._faults:
                if request.startswith(row[0]) and row[2]:
                    if row[3]:
                        row[3] -= 1
                        continue
                    row[2] -= 1
                    return row[1]
        return None


@contextlib.contextmanager
def served() -> Iterator[Server]:
    """A server, and an environment in which the standard chain of AWS leads to it."""
    chain = {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    server = Server()
    chain["AWS_ENDPOINT_URL"] = server.url
    before = {name: os.environ.get(name) for name in chain}
    os.environ.update(chain)
    try:
        yield server
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        server.close()


@contextlib.contextmanager
def both_kinds() -> Iterator[Callable[[str, Path], Storage]]:
    """Gives storage of one of `KINDS` with nothing in it; the server is started when it is needed."""
    with contextlib.ExitStack() as stack:
        servers: list[Server] = []

        def place(kind: str, folder: Path) -> Storage:
            if kind == "folder":
                return at(str(folder))
            if "://" in kind:
                return bucket.open(f"{kind}/{secrets.token_hex(8)}/runs", part_bytes=PART)
            if not servers:
                servers.append(stack.enter_context(served()))
            return servers[0].storage(f"{next(FOLDERS)}/runs")

        yield place


@functools.cache
def _moto() -> tuple[str, int]:
    """One for the whole test process; its threads end with it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    return server.get_host_and_port()


def _forward(method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
    connection = http.client.HTTPConnection(*_moto(), timeout=60)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.getheaders(), answer.read()
    finally:
        connection.close()


def _in(xml: str, tag: str) -> str:
    """What stands in an element: a server may write them in any order."""
    return xml.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    owner: Server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def log_message(self, *words: Any) -> None: ...

    def handle_any(self) -> None:
        fault = self.server.owner.fault_of(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length", 0))
        if isinstance(fault, CutRequest):
            self.rfile.read(min(length, fault.after_bytes))
            self.cut()
            return
        body = self.rfile.read(length)
        if len(body) < length:
            self.cut()
            return
        if isinstance(fault, Body):
            self.reply(200, [("Content-Type", "application/xml")], fault.text.encode())
            return
        if isinstance(fault, Status):
            said = (
                fault.code.encode()
                if fault.status == 200
                else f"<Error><Code>{fault.code}</Code><Message>{fault.code} as told</Message></Error>".encode()
            )
            self.reply(fault.status, [("Content-Type", "application/xml")], said)
            return
        if isinstance(fault, Meanwhile):
            fault.what()
        asked = dict(self.headers.items())
        if self.server.owner.ignores_conditions:
            asked = {name: value for name, value in asked.items() if not name.lower().startswith("if-")}
        status, headers, answer = _forward(self.command, self.path, asked, body)
        if isinstance(fault, LoseAnswer):
            self.cut()
        elif isinstance(fault, CutAnswer):
            self.reply(status, headers, answer, fault.after_bytes)
            self.cut()
        else:
            self.reply(status, headers, answer)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815

    def reply(self, status: int, headers: list[tuple[str, str]], body: bytes, only: int | None = None) -> None:
        self.send_response_only(status)
        length = next((value for name, value in headers if name.lower() == "content-length"), str(len(body)))
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:only])

    def cut(self) -> None:
        """Close as a cable does: without a good-bye."""
        self.wfile.flush()
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True
