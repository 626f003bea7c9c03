"""Decoded weights kept in memory, and decoded ahead of use, within a budget that the user sets."""

import os
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchcodec_weights.codecs.common import operators
from torchcodec_weights.codecs.common.cuda import capturing
from torchcodec_weights.decoders.choice import decode, decode_complete
from torchcodec_weights.decoders.transfer import use_here
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.opened import OpenedMatrix
from torchcodec_weights.system.byte_count import byte_count
from torchcodec_weights.system.setting import Setting

_AHEAD = 2  # weights; two keep the decoding thread busy where layers take unequal times


class _Key(NamedTuple):
    matrix: int  # its serial number
    window: Window
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        return self.window.rows * self.window.cols * self.dtype.itemsize


class DecodedCache:
    """Decoded weights, at most `max_bytes` of them, those being decoded included.

    A use of a weight starts the decoding of the weights that followed it in the last pass, in a
    background thread. A model's layers are used in the same order in each pass, so the weight that
    was used last will be needed last: it is evicted for a weight decoded ahead. In all other cases
    the least recently used weight is evicted.

    A cached weight is complete, so it may be used in any stream of its device. While a CUDA graph
    is captured, nothing is decoded ahead. The weights that the graph uses are kept as long as their
    `OpenedMatrix`, even beyond the budget, as the graph reads their memory.

    Entries belong to `OpenedMatrix` objects. There is one for each weight and its content: a weight
    that is changed gets another, and entries are dropped with their `OpenedMatrix`.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pool: ThreadPoolExecutor | None = None
        self._matrices: weakref.WeakValueDictionary[int, OpenedMatrix] = (
            weakref.WeakValueDictionary()
        )
        self._weights: OrderedDict[_Key, Tensor] = OrderedDict()
        self._ahead: dict[_Key, Future[Tensor]] = {}
        self._captured: dict[_Key, Tensor] = {}
        self._next: dict[_Key, _Key] = {}
        self._last: _Key | None = None
        self.max_bytes = 0
        self.bytes = 0

    def get(
        self, matrix: OpenedMatrix, window: Window, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The decoded weight (window.rows, window.cols), which must not be changed.

        Raises:
            CodecError: a tile is corrupt.
        """
        key = _Key(matrix.serial, window, dtype, device)
        if not capturing(device):
            return use_here(self._get(matrix, key))
        weight = self.look_up(matrix, window, dtype, device)
        return decode(matrix, window, dtype, device) if weight is None else weight

    def _get(self, matrix: OpenedMatrix, key: _Key) -> Tensor:
        with self._lock:
            if self._last != key:
                if self._last is not None:
                    self._next[self._last] = key
                self._last = key
            weight = self._weights.get(key)
            if weight is not None:
                self._weights.move_to_end(key)
                self._decode_ahead(key)
                return weight
            self._know(matrix)
            future = self._ahead.get(key)
        if future is None:
            weight = decode_complete(matrix, key.window, key.dtype, key.device)
        else:
            weight = future.result()
        with self._lock:
            self._keep(key, weight)
            self._decode_ahead(key)
        return weight

    def keeps(self, window: Window, dtype: torch.dtype) -> bool:
        """Whether the budget allows such a weight at all."""
        return 0 < window.rows * window.cols * dtype.itemsize <= self.max_bytes

    def look_up(
        self, matrix: OpenedMatrix, window: Window, dtype: torch.dtype, device: torch.device
    ) -> Tensor | None:
        """The decoded weight if it is cached."""
        key = _Key(matrix.serial, window, dtype, device)
        with self._lock:
            weight = self._weights.get(key, self._captured.get(key))
            if weight is None:
                return None
            if capturing(device):
                self._captured[key] = weight
        return use_here(weight)

    def resize(self, max_bytes: int) -> None:
        """Set the budget and drop what no longer fits; waits for what is being decoded ahead."""
        with self._lock:
            self.max_bytes = max_bytes
            operators.forget()
            pending = list(self._ahead.values())
        wait(pending)
        with self._lock:
            while self.bytes > max_bytes and self._weights:
                self._drop(next(iter(self._weights)))
            if not max_bytes:
                self._next.clear()
                self._last = None

    def _know(self, matrix: OpenedMatrix) -> None:
        if matrix.serial not in self._matrices:
            self._matrices[matrix.serial] = matrix
            weakref.finalize(matrix, self._forget, matrix.serial).atexit = False

    def _forget(self, matrix: int) -> None:
        with self._lock:
            for key in list(self._weights):
                if key.matrix == matrix:
                    self._drop(key)
            for key in [key for key in self._captured if key.matrix == matrix]:
                del self._captured[key]
            pairs = list(self._next.items())
            self._next = {a: b for a, b in pairs if matrix not in (a.matrix, b.matrix)}
            if self._last is not None and self._last.matrix == matrix:
                self._last = None

    def _drop(self, key: _Key) -> None:
        # The garbage collector may run `_forget` at any point of this thread.
        if self._weights.pop(key, None) is not None:
            self.bytes -= key.nbytes

    def _keep(self, key: _Key, weight: Tensor) -> None:
        """Store a weight and evict others, if it is within the budget."""
        if key in self._weights:
            return
        if self._ahead.pop(key, None) is None:
            if key.nbytes > self.max_bytes:
                return
            self.bytes += key.nbytes
        self._weights[key] = weight
        while self.bytes > self.max_bytes and self._weights:
            self._drop(next(iter(self._weights)))

    def _decode_ahead(self, current: _Key) -> None:
        """Start decoding the next weights, as far as the budget allows."""
        key, needed = current, [current]
        for _ in range(_AHEAD):
            following = self._next.get(key)
            if following is None or following in needed:
                return
            key = following
            needed.append(key)
            if key in self._weights or key in self._ahead:
                continue
            matrix = self._matrices.get(key.matrix)
            if matrix is None or not self._evict_for(key, needed):
                return
            self.bytes += key.nbytes
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="torchcodec_weights-ahead")
            threads = torch.get_num_threads()
            self._ahead[key] = self._pool.submit(self._decode_and_keep, matrix, key, threads)

    def _evict_for(self, key: _Key, needed: list[_Key]) -> bool:
        """Evict weights not in `needed`, the last used first; False if that is not enough."""
        others = [other for other in reversed(self._weights) if other not in needed]
        kept = self.bytes - sum(other.nbytes for other in others)
        if kept + key.nbytes > self.max_bytes:
            return False
        for other in others:
            if self.bytes + key.nbytes <= self.max_bytes:
                break
            self._drop(other)
        return True

    def _decode_and_keep(self, matrix: OpenedMatrix, key: _Key, threads: int) -> Tensor:
        try:
            weight = decode_complete(matrix, key.window, key.dtype, key.device, threads)
        except BaseException:
            # The same error is raised again when the weight is used.
            with self._lock:
                del self._ahead[key]
                self.bytes -= key.nbytes
            raise
        with self._lock:
            self._keep(key, weight)
        return weight

    def after_fork(self) -> None:
        """Reset in a child process, which does not have the thread that decodes ahead."""
        max_bytes = self.max_bytes
        self.__init__()  # type: ignore[misc]
        self.max_bytes = max_bytes


CACHE = DecodedCache()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=CACHE.after_fork)


class decoded_cache(Setting):  # noqa: N801 - used as a function
    """Set the budget of decoded weights in memory; 0, the default, decodes at every use.

    If the budget holds two weights or more, the next layer's weight is decoded in the background
    while the current one is used, in the order of the last pass; if it holds three, the next two.

    Takes effect at once and for the whole process. As a context manager it restores the former
    budget at the end, and drops the weights that exceed it.

    Args:
        max_bytes: bytes of decoded weights, a number or with a unit: "512 MiB", "1.5GB". The units
            are B, KB, MB, GB and TB of 1000, KiB, MiB, GiB and TiB of 1024 of the one before. A
            weight larger than this is never kept.

    Raises:
        ValueError: `max_bytes` is negative, not finite, or no such text.
    """

    def __init__(self, max_bytes: float | str) -> None:
        budget = byte_count("max_bytes", max_bytes, zero="keep nothing")
        super().__init__(partial(CACHE.resize, CACHE.max_bytes))
        CACHE.resize(budget)
