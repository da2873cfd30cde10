"""The process that carries snapshots to storage while training goes on. One a node, forked from the zygote.

It is told a step, reads the snapshot where it lies in shared memory, and answers when the checkpoint is committed:

    {"step": 100, "path": "...", "metrics": {...}}  ->  {"written": 100, "bytes": ..., "seconds": ..., "deleted": [...]}
                                                       {"failed": 100, "reason": "..."}
"""

import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dtrain.checkpoint import store
from dtrain.checkpoint.snapshot import Snapshot
from dtrain.errors import StorageError
from dtrain.messages import receive, send
from dtrain.spec.job import Keep


def main(args: dict[str, Any], descriptors: Sequence[int]) -> None:
    torch.set_num_threads(1)
    torch.serialization.set_crc32_options(False)  # the manifest's SHA-256 says more, and a sum is time of a core
    channel = socket.socket(fileno=descriptors[0])
    folder, keep = Path(args["folder"]), Keep.model_validate(args["keep"])
    while (request := receive(channel)) is not None:
        step = request["step"]
        started = time.monotonic()
        try:
            snapshot = Snapshot.open(Path(args["snapshot"]))
            if snapshot.step != step:
                raise StorageError(f"the snapshot holds step {snapshot.step}, not {step}")
            facts = {"metrics": request["metrics"], "num_workers": args["num_workers"]}
            size = store.write(folder, step, snapshot.tensors(), facts)
            deleted = store.prune(folder, keep)
            seconds = round(time.monotonic() - started, 3)
            send(channel, {"written": step, "bytes": size, "seconds": seconds, "deleted": deleted})
        except StorageError as error:
            send(channel, {"failed": step, "reason": error.message})
