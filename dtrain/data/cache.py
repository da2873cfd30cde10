"""Where prepared data is kept on a node: a folder that may be deleted at any time."""

import os
from pathlib import Path


def folder() -> Path:
    """`$XDG_CACHE_HOME/dtrain/data`, by default `~/.cache/dtrain/data` (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "dtrain" / "data"
