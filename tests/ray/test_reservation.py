"""Two runs never share a GPU: each is told which are its own. GPUs are only believed: it is Ray that counts them."""

import json
import subprocess
import sys
from pathlib import Path


def test_each_run_is_told_its_own_gpus(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parent / "reserving.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    first, second, again, third = said["got"]
    assert sorted(first + second) == ["0", "1", "2", "3"]
    assert again == first
    assert said["waits"]
    assert sorted(third) == sorted(first)  # what the first gave back
