"""The threads that run encoders."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def encoder_pool() -> ThreadPoolExecutor:
    """A pool of one thread for each core; each encoder uses a single thread."""
    return ThreadPoolExecutor(core_count(), thread_name_prefix="torchcodec_weights-encode")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=encoder_pool.cache_clear)
