"""`dtrain --help` over an interpreter that does nothing."""

import subprocess
import sys

from tests.benchmarks.harness import Figure, paired
from tests.benchmarks.running import DTRAIN, seconds

TARGET = 6.0
HEAVY = "torch, ray, numpy"
LOOK = f"""
import sys
sys.argv = ["dtrain", "--help"]
sys.stdout = open("/dev/null", "w")
from dtrain import cli
try:
    cli.main()
except SystemExit:
    pass
print(sum(name in sys.modules for name in "{HEAVY}".split(", ")), file=sys.stderr)
"""


def measure(*, is_quick: bool) -> list[Figure]:
    ours, theirs = [], []
    for number in range(5 if is_quick else 40):
        theirs.append(seconds([sys.executable, "-c", "pass"]))
        ours.append(seconds([DTRAIN, "--help"]))
        if number == 0:  # caches were cold
            ours, theirs = [], []
    looked = subprocess.run([sys.executable, "-c", LOOK], check=True, capture_output=True, text=True)
    return [
        paired("dtrain --help : python -c pass", ours, theirs, TARGET),
        Figure("heavy packages imported", float(looked.stderr), 0.0, note=f"of {HEAVY}"),
    ]
