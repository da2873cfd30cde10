"""Tell this node's runs that the node goes away, and wait until they have put their state on storage.

    python -m dtrain.runtime.preempted [--within SECONDS]       before a pod is stopped, or a machine taken back

What runs here writes a checkpoint and goes on elsewhere, and nothing begins here meanwhile. Ends at once where nothing
runs. A machine that is still there half a minute after SECONDS is taken to have stayed.
"""

import argparse
import contextlib
import fcntl
import os
import sys
import time

from dtrain.runtime.own_folder import base, say_going


def main() -> int:
    parser = argparse.ArgumentParser(description="Let this node's runs write a checkpoint before it goes away.")
    parser.add_argument("--within", type=float, default=100.0, help="longest wait in seconds")
    within_s = parser.parse_args().within
    deadline = time.monotonic() + within_s
    say_going(within_s)
    while busy := _busy():
        if time.monotonic() > deadline:
            print(f"still at work: {', '.join(busy)}", file=sys.stderr)
            return 1
        time.sleep(0.2)
    return 0


def _busy() -> list[str]:
    """Runs that something on this node still works on."""
    found = []
    for lease in base().glob("runs/*/*/lease"):
        with contextlib.suppress(OSError):
            descriptor = os.open(lease, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                found.append(lease.parent.name)
            finally:
                os.close(descriptor)
    return sorted(set(found))


if __name__ == "__main__":
    sys.exit(main())
