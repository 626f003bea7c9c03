"""Work for a CUDA device in a thread and a stream of its own, whose results any stream may use.

While a model that torch.compile(mode="reduce-overhead") made warms up, all that its thread
allocates is memory of the CUDA graph, and must be gone when the graph is captured. What is to stay
is allocated by another thread, which PyTorch's allocator serves from its ordinary memory.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="torchcodec_weights-side")


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def run(work: Callable[[], T], device: torch.device) -> T:
    """Call a function in the side thread and stream, after all work of the current stream.

    The host waits until the device has done all of it, so that every stream may use the result.
    Not while the current stream captures a CUDA graph. What the result holds of the device's memory
    belongs to the side stream: see `StreamUses`.

    Args:
        device: with its index.

    Returns:
        What the function returned.

    Raises:
        Whatever it raises.
    """
    side = _stream(device)
    side.wait_stream(torch.cuda.current_stream(device))

    def complete() -> T:
        with torch.cuda.device(device), torch.cuda.stream(side), torch.no_grad():
            result = work()
            side.synchronize()
        return result

    return _pool().submit(complete).result()


class StreamUses:
    """Tells PyTorch's allocator in which streams tensors of another stream are used.

    Memory that is freed goes back to the stream that it was allocated in, and may be written there
    at once, while a kernel that was started in another stream still reads it. `record_stream` makes
    the allocator wait for what was started in that stream until the memory was freed. It remembers
    the stream until then, so each is recorded once, not at every use.

    A capture starts nothing, so its stream need not be recorded: what counts is where the graph is
    replayed, of which the allocator is not told. That mostly is the default stream, which is always
    recorded. Where it is another, what the graph reads must outlive the replay, as of any tensor.

    Args:
        tensors: on one CUDA device.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._device = list(tensors), tensors[0].device
        self._known: set[int] = set()
        self._record(torch.cuda.default_stream(self._device))

    def record_current(self) -> None:
        """Say that the current stream is about to use the tensors."""
        stream = torch.cuda.current_stream(self._device)
        if stream.cuda_stream in self._known:
            return
        with torch.cuda.device(self._device):
            if not torch.cuda.is_current_stream_capturing():
                self._record(stream)

    def _record(self, stream: torch.cuda.Stream) -> None:
        for tensor in self._tensors:
            tensor.record_stream(stream)
        self._known.add(stream.cuda_stream)
