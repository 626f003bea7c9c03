"""The threads that run encoders."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def encoder_pool() -> ThreadPoolExecutor:
    """One thread for each core; an encoder runs with one thread of its own."""
    return ThreadPoolExecutor(core_count(), thread_name_prefix="torchcodec_weights-encode")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=encoder_pool.cache_clear)
