"""The process that carries snapshots to storage while training goes on. One a node, forked from the zygote.

It is told a step, reads the snapshot where it lies in shared memory, and answers when the checkpoint is committed:

    {"step": 100, "attempt": 1, "metrics": {...}}  ->  {"written": 100, "bytes": ..., "seconds": ..., "deleted": [...],
                                                         "refused": ...}
                                                       {"failed": 100, "reason": "..."}

Of a state that is sharded over nodes each writes its part, and the first node's commits when all are there.
"""

import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dtrain.checkpoint import shelf
from dtrain.checkpoint.snapshot import segments
from dtrain.errors import StorageError
from dtrain.messages import receive, send
from dtrain.settings import convert
from dtrain.spec.job import Keep


def main(args: dict[str, Any], descriptors: Sequence[int]) -> None:
    torch.set_num_threads(1)
    torch.serialization.set_crc32_options(False)  # the manifest's SHA-256 says more, and a sum is time of a core
    channel = socket.socket(fileno=descriptors[0])
    keep = convert(args["keep"], Keep)
    shelved = shelf.of(Path(args["folder"]), args.get("away"))
    node, num_nodes = args["node"], args["num_nodes"]
    while (request := receive(channel)) is not None:
        step = request["step"]
        started = time.monotonic()
        try:
            held = segments(Path(args["snapshot"]), args["num_local"])
            if {segment.step for segment in held} != {step}:
                raise StorageError(f"the snapshot holds step {', '.join(str(s.step) for s in held)}, not {step}")
            pieces = [piece for segment in held for piece in segment.pieces()]
            is_shared = num_nodes > 1 and not Path(args["snapshot"]).exists()
            part = shelf.Part(step, request["attempt"], node, num_nodes if is_shared else 1)
            facts = {
                "metrics": request["metrics"],
                "num_workers": args["num_workers"],
                "data": request["data"],
                "written_at": time.time(),
            }
            put = shelved.put(part, pieces, facts, keep)
            seconds = round(time.monotonic() - started, 3)
            said = {"written": step, "bytes": put.num_bytes, "seconds": seconds, "deleted": list(put.deleted)}
            send(channel, {**said, "refused": put.refused})
        except StorageError as error:
            send(channel, {"failed": step, "reason": error.message})
