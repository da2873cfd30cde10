"""Freed memory is used again."""

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, sys
from dtrain.training.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]


def round():
    block = malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    free(block)


round()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    round()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told anything")
def test_freed_memory_is_not_given_back() -> None:
    def faults(word: str) -> int:
        done = subprocess.run([sys.executable, "-c", SCRIPT, word], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < 100
    assert faults("leave") > 1000  # else this test would say nothing
