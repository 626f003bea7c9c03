"""Decoded weights kept in memory, up to a budget that the user sets."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from types import TracebackType

from torch import Tensor


class DecodedCache:
    """Least recently used decoded weights, at most `max_bytes` of them.

    Keys name the content (a checksum and an address), so a weight that was changed or freed is
    never mistaken for another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()
        self.max_bytes = 0
        self.bytes = 0

    def get(self, key: Hashable, decode: Callable[[], Tensor]) -> Tensor:
        """The cached weight, or what `decode` returns, kept if it fits the budget."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        weight = decode()
        with self._lock:
            if weight.nbytes <= self.max_bytes and key not in self._entries:
                self._entries[key] = weight
                self.bytes += weight.nbytes
                self._shrink()
        return weight

    def resize(self, max_bytes: int) -> None:
        """Set the budget and drop what no longer fits."""
        with self._lock:
            self.max_bytes = max_bytes
            self._shrink()

    def _shrink(self) -> None:
        while self.bytes > self.max_bytes:
            _, weight = self._entries.popitem(last=False)
            self.bytes -= weight.nbytes


CACHE = DecodedCache()


class decoded_cache:  # noqa: N801 - used as a function
    """Set how much decoded weight may stay in memory; 0, the default, decodes at every use.

    Takes effect at once and for the whole process. As a context manager it restores the former
    budget at the end, and drops what that does not allow.

    Args:
        max_bytes: bytes of decoded weights, least recently used ones go first. A weight larger
            than this is never kept.

    Raises:
        ValueError: `max_bytes` is negative.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes={max_bytes}: allowed: 0 (keep nothing) and above")
        self._former = CACHE.max_bytes
        CACHE.resize(int(max_bytes))

    def __enter__(self) -> "decoded_cache":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        CACHE.resize(self._former)
