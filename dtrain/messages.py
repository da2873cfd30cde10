"""Messages between the processes of one node: JSON objects over a SOCK_SEQPACKET pair, each whole or not at all."""

import json
import socket
from collections.abc import Mapping
from typing import Any

MAX_BYTES = 180_000
"""Longest message; a longer text in it (a traceback) is cut to fit."""


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(channel: socket.socket, message: Mapping[str, Any]) -> bool:
    """Send one message; False when the other side is gone."""
    data = json.dumps(message, default=str).encode()
    if len(data) > MAX_BYTES:
        cut = {k: v[: MAX_BYTES // 8] if isinstance(v, str) else v for k, v in message.items()}
        data = json.dumps(cut, default=str).encode()[:MAX_BYTES]
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
