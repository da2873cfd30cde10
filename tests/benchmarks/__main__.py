"""Run benchmarks by name, print their tables, keep their lines."""

import argparse
import importlib
import os
import sys
import time
import traceback

from tests.benchmarks import harness

BENCHMARKS = {
    "help": "command",
    "dry-run": "dry_run",
    "ps": "ps",
    "step": "step",
    "strategies": "strategies",
    "startup": "startup",
    "recovery": "recovery",
    "recovery-soak": "soak",
    "checkpoint": "checkpoint",
    "data": "data",
    "gpu-gpt2": "gpu_gpt2",
    "gpu-resnet": "gpu_resnet",
    "gpu-gan": "gpu_gan",
    "gpu-strategies": "gpu_strategies",
}
"""Name on the command line, and the module here whose `measure(is_quick=...)` returns figures."""
GROUPS = {"gpu": [name for name in BENCHMARKS if name.startswith("gpu-")]}


def main() -> None:
    from rich.console import Console

    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join([*BENCHMARKS, *GROUPS])}; all by default")
    parser.add_argument("--quick", action="store_true", help="few measurements, to see that it works; nothing is kept")
    arguments = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what is measured has its bytecode, as what is installed has
    unknown = [name for name in arguments.names if name not in BENCHMARKS and name not in GROUPS]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there is: {', '.join([*BENCHMARKS, *GROUPS])}")
    console = Console()
    console.width = max(console.width, 130)
    broken: list[str] = []
    missing: dict[str, list[str]] = {}
    for name in [one for asked in arguments.names or BENCHMARKS for one in GROUPS.get(asked, [asked])]:
        module = importlib.import_module(f"tests.benchmarks.{BENCHMARKS[name]}")
        started = time.monotonic()
        try:
            figures = module.measure(is_quick=arguments.quick)
        except harness.NotHere as problem:
            missing.setdefault(str(problem), []).append(name)
            continue
        except Exception:
            traceback.print_exc()  # the others may be worth their time, on a machine that is lent for an hour
            broken.append(name)
            continue
        entry = harness.line(name, figures, time.monotonic() - started, is_quick=arguments.quick)
        console.print(harness.table(name, figures))
        if not arguments.quick:
            harness.keep(harness.RESULTS, entry)
    for reason, names in missing.items():
        console.print(f"{', '.join(names)}: {reason}")
    if broken:
        sys.exit(f"could not be measured: {', '.join(broken)}")


if __name__ == "__main__":
    main()
