"""The data of a node are readied before its ranks start, in a process of their own: faults are seen like any others."""

import os
import selectors
import time
from collections.abc import Callable
from typing import Any

from dtrain.errors import Stopped, from_kind
from dtrain.messages import pair, receive
from dtrain.runs import Run
from dtrain.runtime.ledger import Ledger
from dtrain.runtime.line import DriverLine
from dtrain.runtime.zygote import Zygote

QUICK_S = 1.0
"""What takes no longer is not worth an event."""


def prepare(
    run: Run,
    node: int,
    zygote: Zygote,
    selector: selectors.BaseSelector,
    turn: Callable[[float], None],
    line: DriverLine,
    ledger: Ledger,
) -> None:
    """Ready them; `turn` reads what `selector` has for so many seconds, the driver's words among it.

    Raises `InputError` for data that are not as the job says, `TrainingError` for a fault, `Stopped` when asked to.
    """
    ours, theirs = pair()
    with open(run.logs / f"prepare-{node}.log", "ab") as log:
        args = {"run": str(run.path)}
        child = zygote.fork("dtrain.runtime.rank:prepare", args, [theirs.fileno()], log.fileno(), "prepare")
    theirs.close()
    answer: list[dict[str, Any]] = []

    def read() -> None:
        answer.append(receive(ours) or {"error": "it was killed", "class": "", "kind": "killed"})
        selector.unregister(ours)

    selector.register(ours, selectors.EVENT_READ, read)
    started, is_told = time.monotonic(), False
    while not answer:
        turn(0.05)
        if not is_told and time.monotonic() - started > QUICK_S:
            is_told = True
            ledger.event("prepare", "preparing the data")
        if line.stop is not None:
            child.kill()
            raise Stopped(f"stopped by {line.stop} before training began")
    zygote.wait(child, 5.0)
    ours.close()
    os.close(child.pidfd)
    said = answer[0]
    if "error" in said:
        kind = said["kind"] if said["kind"] == "input" else "training"
        text = said["error"] if kind == "input" else f"preparing the data failed: {said['class']}: {said['error']}"
        line.tell({"record": {"error": said.get("detail") or text}})
        raise from_kind(kind, text)
