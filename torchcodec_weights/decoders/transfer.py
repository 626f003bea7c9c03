"""Copies from the host to a CUDA device, and hand-over of tensors between streams.

No function here waits for the device.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def use_here(weight: Tensor) -> Tensor:
    """Tell the allocator that the current stream uses a weight of another stream; returns it."""
    if weight.is_cuda:
        weight.record_stream(torch.cuda.current_stream(weight.device))
    return weight


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device. The allocator keeps the pinned memory until the copy is done."""
    tensor = torch.from_numpy(np.array(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def pinned(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor (rows, cols) in pinned memory, for copies that run asynchronously."""
    with torch.inference_mode(False):
        return torch.empty(rows, cols, dtype=dtype, pin_memory=True)


def upload(rows: Tensor, device: torch.device) -> Tensor:
    """Copy from pinned memory in a stream of its own; the current stream waits for it."""
    current, side = torch.cuda.current_stream(device), stream_of(device, "upload")
    with torch.cuda.stream(side):
        # Allocated in that stream, so that the copy need not wait for the current stream's work.
        copied = rows.to(device, non_blocking=True)
        done = side.record_event()
    current.wait_event(done)
    copied.record_stream(current)
    return copied


@cache
def stream_of(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """The stream of a device for one purpose, the same at every call."""
    return torch.cuda.Stream(device)
