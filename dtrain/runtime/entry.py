"""The driver's process: a Ray job of its own, in its own session, which outlives the terminal that submitted the run.

On the embedded cluster a driver waits, already connected, for the next run, so that a submit does not pay for an
interpreter and `ray.init`.

    python -m dtrain.runtime --run FOLDER ...              drive this run
    python -m dtrain.runtime --wait ...                    wait in the cluster's folder for the next one

On other clusters `dtrain.runtime.remote` starts it: there somebody submits the run again when its driver is lost, so
one that has to leave, leaves the run under way.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrain.errors import DtrainError
from dtrain.runs import Run
from dtrain.runtime.driver import Driver
from dtrain.runtime.joining import await_run, is_alive, join, watch
from dtrain.runtime.zygote import Zygote


def main(argv: Sequence[str] | None = None) -> int:
    arguments = arguments_of(argv)
    command = [sys.executable, "-m", "dtrain.runtime", *_common(arguments)]
    waiting_command = [*command, "--wait"]
    until = watch(arguments.until)
    ray: Any = None
    run_path = arguments.run
    try:
        if arguments.wait:
            ray = join(arguments, "waiting for a run", until)
            Zygote.connect(arguments.folder, arguments.until).close()
            run_path = await_run(arguments.folder, until)
            if run_path is None:
                return 0
        with open(Path(run_path) / "logs" / "driver.log", "ab", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        driver = Driver(Run(Path(run_path)), arguments, [*command, "--run", str(run_path)], until)
        driver.drive(ray)
        return 0
    except DtrainError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    finally:
        if arguments.spare and not (arguments.wait and run_path is None) and is_alive(until):
            log_file = _log(arguments)
            subprocess.Popen(
                waiting_command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file, start_new_session=True
            )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # Ray's own shutdown takes a second, and longer when its head is gone


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Drive a run.")
    parser.add_argument("--run", type=Path, help="the run folder")
    parser.add_argument("--wait", action="store_true", help="wait for a run to be handed over")
    parser.add_argument("--address", required=True, help="host:port of the Ray head")
    parser.add_argument("--token", type=Path, help="file with Ray's authentication token")
    parser.add_argument("--folder", type=Path, required=True, help="folder of sockets on this node")
    parser.add_argument("--until", type=int, default=0, help="process not to outlive")
    parser.add_argument("--again", action="store_true", help="the run's driver before this one was lost")
    parser.add_argument("--placed", action="store_true", help="let Ray Train place the agents, also of one node")
    parser.add_argument("--lease", type=int, help="descriptor of the run's lease, inherited")
    parser.add_argument("--turn", type=int, help="descriptor of the lock that lets this run begin before Ray is up")
    parser.add_argument("--spare", action="store_true", help="leave a waiting driver behind")
    return parser.parse_args(argv)


def _common(arguments: argparse.Namespace) -> list[str]:
    words = ["--address", arguments.address, "--folder", str(arguments.folder), "--until", str(arguments.until)]
    words += ["--token", str(arguments.token)] if arguments.token else []
    return words + (["--spare"] if arguments.spare else [])


def _log(arguments: argparse.Namespace) -> Any:
    return open(arguments.folder / "drivers.log", "ab")
