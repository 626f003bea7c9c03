"""Memory of this process."""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any


def resident() -> int:
    """Bytes of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def release_freed() -> None:
    """Give freed memory back to the system, which malloc keeps for each thread that ran."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
