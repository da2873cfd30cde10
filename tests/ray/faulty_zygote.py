"""The real zygote, with one change: reading the n-th batch of a worker may go wrong, once, as a file says.

    python faulty_zygote.py FOLDER FAULTS UNTIL        FAULTS/<rank>.json: {"of": "train", "batch": 7, "do": "kill"}

So faults strike at an exact step, inside the real processes, and nothing in dtrain knows of tests.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

from dtrain.runtime import zygote_server

FAULTS = Path(sys.argv[2])


def bad_sample(number: int) -> None:
    raise ValueError(f"sample {number} is bad")


def strike(what: str, number: int) -> None:
    if what == "raise":
        bad_sample(number)
    elif what == "exit":
        os._exit(0)
    elif what == "segfault":
        ctypes.string_at(0)
    elif what == "hang":
        time.sleep(10_000)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        os.kill(os.getpid(), signal.SIGKILL)


def wrap(batch, part):
    count = 0

    def read(indices, draws):
        nonlocal count
        import torch.distributed as dist

        count += 1
        path = FAULTS / f"{dist.get_rank() if dist.is_initialized() else 0}.json"
        if path.exists():
            fault = json.loads(path.read_text())
            if (count, part) == (fault["batch"], fault["of"]):
                path.rename(path.with_suffix(".struck"))
                strike(fault["do"], count)
        return batch(indices, draws)

    return read


def main() -> None:
    from dtrain.data import text

    real = text.open

    def faulty_open(options, cache):
        source = real(options, cache)
        source.train.batch = wrap(source.train.batch, "train")
        source.held_out.batch = wrap(source.held_out.batch, "held_out")
        return source

    text.open = faulty_open
    sys.argv = ["zygote", sys.argv[1], "--until", sys.argv[3]]
    zygote_server.main()


if __name__ == "__main__":
    main()
