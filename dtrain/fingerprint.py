"""One short word for the interpreter and the code of dtrain that a process runs: warm processes of older code are left."""

import hashlib
import sys
from pathlib import Path


def of_code() -> str:
    root = Path(__file__).resolve().parent
    digest = hashlib.sha256(sys.executable.encode())
    for path in sorted(root.rglob("*.py")):
        stat = path.stat()
        digest.update(f"{path}:{stat.st_mtime_ns}:{stat.st_size}".encode())
    return digest.hexdigest()[:12]
