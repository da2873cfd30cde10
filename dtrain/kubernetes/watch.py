"""What becomes of objects: a list, then every change, through cut connections and forgotten versions, for a time."""

import json
import time
from collections.abc import Generator, Iterator

from dtrain.kubernetes.client import Client, Kind, Object
from dtrain.kubernetes.errors import Refused

SILENCE_S = 45.0
"""A watch that says nothing for so long, not even a bookmark, is opened anew."""
PAUSE_S = 0.3
"""Between two watches: one that is cut at once, again and again, does not become a flood of requests."""
MOST_CUTS = 5
"""Watches in a row that tell nothing before they are cut: then a list asks whether anybody is there at all."""


def watch(
    client: Client, kind: Kind, namespace: str | None, labels: str = "", fields: str = "", *, timeout_s: float
) -> Generator[dict[str, Object]]:
    """All objects that match, by name: first as they are, then after each change, for `timeout_s` seconds.

    Raises `ClusterError` when the server cannot be asked at all.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        items, version = client.list(kind, namespace, labels, fields)
        found = {item["metadata"]["name"]: item for item in items}
        yield dict(found)
        num_cuts = 0
        while version and num_cuts < MOST_CUTS:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            query = {"watch": "1", "allowWatchBookmarks": "true", "resourceVersion": version}
            query |= {"timeoutSeconds": str(max(1, round(left)))}
            query |= {key: value for key, value in (("labelSelector", labels), ("fieldSelector", fields)) if value}
            num_cuts += 1
            for event in _events(client, kind.path(namespace), query, min(left, SILENCE_S)):
                made, num_cuts = event["object"], 0
                if event["type"] == "ERROR":  # 410: what happened since is forgotten
                    version = ""
                    break
                version = made["metadata"]["resourceVersion"]
                if event["type"] == "BOOKMARK":
                    continue
                if event["type"] == "DELETED":
                    found.pop(made["metadata"]["name"], None)
                else:
                    found[made["metadata"]["name"]] = made
                yield dict(found)
            if deadline - time.monotonic() > PAUSE_S:
                time.sleep(PAUSE_S)
        if deadline - time.monotonic() <= 0:
            return


def _events(client: Client, path: str, query: dict[str, str], silence_s: float) -> Iterator[Object]:
    """Events of one watch, until it ends or is cut."""
    try:
        with client.stream(path, query, silence_s) as lines:
            for line in lines:
                yield json.loads(line)
    except Refused as refusal:
        if refusal.code not in (401, 410, 429, 500, 502, 503, 504):
            raise
        if refusal.code in (401, 410):  # a list renews what was refused, or says why it cannot
            yield {"type": "ERROR", "object": {}}
    except (OSError, ValueError):
        return  # cut, or silent: the caller goes on from the last version it saw
