"""Messages between the processes of one node: JSON objects over a SOCK_SEQPACKET pair, each whole or not at all."""

import json
import socket
from collections.abc import Mapping
from typing import Any

MAX_BYTES = 180_000
"""Longest message; in a longer one texts (a traceback) are cut to fit."""


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(channel: socket.socket, message: Mapping[str, Any]) -> bool:
    """Send one message; False when the other side is gone."""
    data = _encode(message)
    limit = MAX_BYTES // 8
    while len(data) > MAX_BYTES and limit:
        # A character takes up to twelve bytes once it is escaped: what is cut in half is never the JSON itself.
        data = _encode({key: _cut(value, limit) for key, value in message.items()})
        limit //= 2
    try:
        channel.sendall(data)
    except OSError:
        return False
    return True


def receive(channel: socket.socket) -> dict[str, Any] | None:
    """The next message, waited for; None when the other side is gone."""
    try:
        data = channel.recv(MAX_BYTES + 1)
    except OSError:
        return None
    return dict(json.loads(data)) if data else None


def _encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, default=str).encode()


def _cut(value: Any, limit: int) -> Any:
    """A text cut to `limit` characters; nothing instead of another value that takes more than that."""
    if isinstance(value, str):
        return value[:limit]
    return value if len(json.dumps(value, default=str)) <= limit else None
