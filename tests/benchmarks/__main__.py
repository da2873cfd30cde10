"""Run benchmarks by name, print their tables, keep their lines."""

import argparse
import importlib
import time

from tests.benchmarks import harness

BENCHMARKS = {
    "help": "command",
    "dry-run": "dry_run",
    "step": "step",
    "strategies": "strategies",
    "startup": "startup",
    "recovery": "recovery",
    "recovery-soak": "soak",
    "checkpoint": "checkpoint",
    "data": "data",
}
"""Name on the command line, and the module here whose `measure(is_quick=...)` returns figures."""


def main() -> None:
    from rich.console import Console

    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="few measurements, to see that it works; nothing is kept")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there is: {', '.join(BENCHMARKS)}")
    console = Console()
    console.width = max(console.width, 130)
    for name in arguments.names or BENCHMARKS:
        module = importlib.import_module(f"tests.benchmarks.{BENCHMARKS[name]}")
        started = time.monotonic()
        figures = module.measure(is_quick=arguments.quick)
        entry = harness.line(name, figures, time.monotonic() - started, is_quick=arguments.quick)
        console.print(harness.table(name, figures))
        if not arguments.quick:
            harness.keep(harness.RESULTS, entry)


if __name__ == "__main__":
    main()
