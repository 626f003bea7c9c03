"""Memory of this process."""

import ctypes
import os
import resource
import sys
from functools import cache
from pathlib import Path
from typing import Any

_STATM = Path("/proc/self/statm")


def resident() -> int:
    """Bytes of memory that this process has now; where the system has no /proc, had at most."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def available() -> int:
    """Bytes that this process may still take without swapping, as far as the system tells."""
    text = Path("/proc/meminfo").read_text()
    free = 1024 * int(text.split("MemAvailable:")[1].split()[0])
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - resident())
    return free


def release_freed() -> None:
    """Give freed memory back to the system, which malloc keeps for each thread that ran."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
