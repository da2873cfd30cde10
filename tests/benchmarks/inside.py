"""Measures inside dtrain's real ranks: a run with its real agent, whose ranks do a rival's work between their steps.

Both sides then share processes, memory, threads and noise. Ray has no part in it and is left out: the agent is forked
from a zygote of the benchmark's own, in which the keeper of the loop is replaced by one that measures.

    python -m tests.benchmarks.inside KEEPER FOLDER --until PID       that zygote; KEEPER is module:class
"""

import json
import secrets
import subprocess
import sys
from multiprocessing.connection import Listener, wait
from pathlib import Path
from typing import Any

from dtrain import runs
from dtrain.plan import Plan
from dtrain.runtime.hosts import EmbeddedHost
from dtrain.runtime.zygote import socket_path
from tests.benchmarks.harness import ROOT
from tests.benchmarks.running import await_


def run(plan: Plan, keeper: str, folder: Path) -> dict[str, Any]:
    """Run `plan` to its end with `keeper` in its ranks; returns what worker 0's keeper wrote to `measured.json`."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = runs.create(plan, "", runs.new_name(plan))
    lease = made.acquire()
    with subprocess.Popen(["sleep", "infinity"]) as until, (folder / "zygote.log").open("ab") as log:
        command = [sys.executable, "-m", "tests.benchmarks.inside", keeper, str(folder), "--until", str(until.pid)]
        with subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT) as zygote:
            try:
                await_(
                    socket_path(folder, until.pid).exists,
                    120.0,
                    f"the zygote did not come up; see {folder / 'zygote.log'}",
                )
                end = _host(made, folder, until.pid, lease)
            finally:
                until.kill()
                zygote.kill()
    if end["state"] != "succeeded":
        logs = "".join(path.read_text() for path in made.logs.glob("*.log"))
        raise RuntimeError(f"{made.id}: {end['state']}: {end['cause']}\n{logs[-4000:]}")
    return dict(json.loads((made.path / "measured.json").read_text()))


def _host(made: runs.Run, folder: Path, until: int, lease: int) -> dict[str, Any]:
    """What the driver does: fork the agent, listen until it has said how it came out."""
    secret = secrets.token_bytes(32)
    with Listener(("127.0.0.1", 0), authkey=secret) as listener:
        args = {"run": str(made.path), "attempts": [], "secret": secret.hex(), "host": "127.0.0.1"}
        host = EmbeddedHost({**args, "driver": list(listener.address)}, folder, until, lease)
        try:
            with listener.accept() as agent:
                message: dict[str, Any] = {}
                while "end" not in message:
                    message = agent.recv()
                wait(host.sentinels())  # it gives its memory back
            return dict(message["end"])
        finally:
            host.close()


def main() -> None:
    import importlib

    from dtrain.runtime import rank, zygote_server

    module, _, name = sys.argv.pop(1).partition(":")
    rank.Keeper = getattr(importlib.import_module(module), name)  # type: ignore[misc]
    zygote_server.main()


if __name__ == "__main__":
    main()
