"""`compress` in the processes of torchrun, which share the tensors by size."""

import os
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from torchcodec_weights.convert.plan import Choice
from torchcodec_weights.convert.run import Limits, Run
from torchcodec_weights.convert.source import Source

_LONGEST = timedelta(days=60)  # that one process waits for the slowest


def is_shared() -> bool:
    """Whether this process is one of several of torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def is_first() -> bool:
    """Whether this process is alone, or the first of those of torchrun."""
    return not is_shared() or os.environ["RANK"] == "0"


def compress_distributed(source: Source, out: Path, choice: Choice, limits: Limits) -> bool | None:
    """Run `compress` in this process, or the share of it that torchrun gives it.

    All processes see the same file system. What they exchange, by gloo, is only that they have
    come to the end; a process that fails ends the others, and what was finished is kept.

    Returns:
        Whether the output is whole, in the first process; None in the others.

    Raises:
        ValueError, NotByBlocksError, RateError, CodecError, OSError: as `Run`.
    """
    if not is_shared():
        return Run(source, out, choice, limits)()
    if limits.worker is not None or limits.force:
        raise ValueError("--worker, --force: allowed without torchrun")
    dist.init_process_group("gloo", timeout=_LONGEST)
    try:
        rank = dist.get_rank()
        Run(source, out, choice, _worker(limits, rank, dist.get_world_size()))()
        dist.barrier()
        return Run(source, out, choice, limits)() if rank == 0 else None
    finally:
        dist.destroy_process_group()


def _worker(limits: Limits, rank: int, count: int) -> Limits:
    return Limits(limits.max_memory, False, False, (rank, count))
