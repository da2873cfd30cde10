"""Start a driver: `python -m dtrain.runtime --run FOLDER ...`, see `dtrain/runtime/entry.py`.

The zygote's imports take longest of all that a cold start does, so they begin before the driver's own.
"""

import argparse
import sys
from pathlib import Path

from dtrain.runtime.zygote import warm_up

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--until", type=int, default=0)
    known, _ = parser.parse_known_args()
    if known.folder is not None:
        warm_up(known.folder, known.until)
    from dtrain.runtime import entry

    sys.exit(entry.main())
