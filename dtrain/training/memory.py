"""How the C library hands out memory. Only glibc is told anything; elsewhere nothing happens."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process, and what it forks, use freed memory again instead of giving it back to the system.

    A training step on a CPU frees and takes the same large blocks again and again; glibc would map each of them
    anew, and the system would fill it with zeros page by page. Measured on a GPT of 1.3 million parameters: 139 ms
    of CPU time a step instead of 177 ms.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_INT)
    mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)
