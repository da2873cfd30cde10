"""One worker that runs a script of the user's own: launched as `torchrun` would, forked from the zygote by the agent.

Environment variables carry settings here and nowhere else: they are the contract of scripts written for `torchrun` or
`accelerate launch`.

rank -> agent
{"ready": 0}           the script begins
{"metrics": {...}}     worker 0 only: what it reported
{"done": {...}}        the script came to its end, or left with exit code 0
{"error": ..., ...}    an exception that it did not catch
"""

import atexit
import faulthandler
import functools
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d

from dtrain import current
from dtrain.messages import send
from dtrain.plan import ScriptPlan
from dtrain.runs import Run
from dtrain.runtime import rendezvous
from dtrain.runtime.control import Control
from dtrain.runtime.rank import text_of
from dtrain.runtime.watchdog import SCRIPT

CHECKPOINT_DIR = "{checkpoint_dir}"
"""Stands in a script's arguments for the folder where its checkpoints belong."""
MAX_RESTARTS = "1000000"
"""What the script is told: how often it is really started again is in `retry`."""
_kept: list[Any] = []
"""Process groups of the script."""


def main(args: dict[str, Any], descriptors: Sequence[int]) -> int:
    """Entry of a rank: `args` as the agent's `Attempt` writes them, `descriptors` [channel]."""
    os.setpgid(0, 0)  # what the script starts is ended with it
    channel = socket.socket(fileno=descriptors[0])
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # the agent asks a hung rank where it is
    run = Run(Path(args["run"]))
    plan = run.plan
    assert isinstance(plan, ScriptPlan)
    told: dict[str, Any] = {"steps": 0, "metrics": {}, "reports": 0}
    control = Control.open(Path(args["control"]))

    def tell(step: int, figures: dict[str, Any]) -> None:
        told["reports"] += 1
        control.beat(args["local_rank"], step, told["reports"], SCRIPT)
        told["steps"] = max(told["steps"], step)
        held_out = figures.pop("held_out", None)
        if args["rank"] == 0 and figures:
            send(channel, {"metrics": {"step": step, **figures}})
        if args["rank"] == 0 and held_out:
            told["metrics"] = held_out
            send(channel, {"metrics": {"step": step, "held_out": held_out}})

    current.begin(current.CurrentRun(run.path, int(args["generation"]), tell))
    try:
        _enter(plan, environment(plan, args))
        send(channel, {"ready": 0})
        code = _run(plan)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:
        _complain(error)
        kind = "peer" if rendezvous.is_peer_loss(error) else "error"
        send(
            channel,
            {
                "error": str(error) or type(error).__name__,
                "class": type(error).__name__,
                "kind": kind,
                "detail": text_of(error),
                "step": told["steps"],
            },
        )
        os._exit(1)
    if code == 0:
        send(channel, {"done": told})
    os._exit(code)


def environment(plan: ScriptPlan, args: Mapping[str, Any]) -> dict[str, str]:
    """What a script finds of its launch: the variables of `torchrun`, of `accelerate launch`, and two of dtrain's."""
    rank, world, local, node = args["rank"], args["world"], args["local_rank"], args["node"]
    workers = plan.workers
    found = {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": args["local_world"],
        "GROUP_RANK": node,
        "GROUP_WORLD_SIZE": workers.num_nodes,
        "NODE_RANK": node,
        "ROLE_NAME": "default",
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": world,
        "MASTER_ADDR": args["restore"]["host"],
        "MASTER_PORT": args["restore"]["port"],
        # The agent serves the store of each attempt: its port cannot be taken by another process in between.
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RUN_ID": Path(args["run"]).name,
        "TORCHELASTIC_RESTART_COUNT": int(args["generation"]) - 1,
        "TORCHELASTIC_MAX_RESTARTS": MAX_RESTARTS,
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": 1,
        "OMP_NUM_THREADS": workers.threads,
        "PYTHONUNBUFFERED": 1,
        current.RUN: args["run"],
        current.CHECKPOINTS: str(Path(args["run"]) / "checkpoints"),
    }
    if workers.device == "cpu":
        found["ACCELERATE_USE_CPU"] = "true"  # else each worker of an Accelerate script would train alone
    if args.get("gpus"):
        found["CUDA_VISIBLE_DEVICES"] = ",".join(args["gpus"])
    if workers.num_nodes == 1:
        found |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return {**{key: str(value) for key, value in found.items()}, **plan.entrypoint.environment}


def _enter(plan: ScriptPlan, variables: Mapping[str, str]) -> None:
    """Make this process what `python script.py ...` would be."""
    os.environ.update(variables)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    script = Path(plan.entrypoint.script)
    folder = variables[current.CHECKPOINTS]
    sys.argv = [str(script), *(str(word).replace(CHECKPOINT_DIR, folder) for word in plan.entrypoint.args)]
    os.chdir(plan.folder)
    sys.path[0] = str(script.parent)  # in place of the folder in which the zygote was started
    _keep_process_groups()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _keep_process_groups() -> None:
    """Let no process group be freed before this process ends, whatever the script does with it.

    Freeing one waits for its threads while it holds Python's lock, and such a thread may be waiting for that lock to
    free a tensor: with gloo, one in ten scripts that end right after a collective would hang for good.
    """
    for name in ("init_process_group", "new_group"):
        original = getattr(distributed_c10d, name)

        @functools.wraps(original)
        def keeping(*args: Any, _original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            made = _original(*args, **kwargs)
            _kept.append(distributed_c10d.group.WORLD if made is None else made)
            return made

        setattr(distributed_c10d, name, keeping)
        setattr(torch.distributed, name, keeping)


def _run(plan: ScriptPlan) -> int:
    """Run the script to its end, and what it has left for then; returns its exit code."""
    code = 0
    try:
        runpy.run_path(plan.entrypoint.script, run_name="__main__")
    except SystemExit as leave:
        if leave.code is not None and not isinstance(leave.code, int):
            print(leave.code, file=sys.stderr)
        code = 1 if not isinstance(leave.code, int | None) else leave.code or 0
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    return code


def _complain(error: BaseException) -> None:
    """The script's own traceback, without the frames that led into it."""
    if error.__traceback__ is not None:
        print(text_of(error), file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
