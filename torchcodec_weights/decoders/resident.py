"""Weights that are kept in memory in another form than their bitstream: as int8 levels, or dense.

The bitstream stays as it is. What is kept belongs to the `OpenedMatrix`, so a weight that is
written to, moved or copied is decoded from its bitstream again.
"""

import weakref
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torchcodec_weights.codecs.common import operators
from torchcodec_weights.decoders import choice
from torchcodec_weights.decoders.int8 import int8_weight
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.opened import OpenedMatrix

FORMS = ("bits", "int8", "dense")


class KeptWeight(Protocol):
    """A weight in memory, on the CPU. Each method returns None for dtypes it does not support."""

    @property
    def form(self) -> str:
        """One of `FORMS`."""

    @property
    def window(self) -> Window:
        """The rows and columns of the encoded matrix that the weight consists of."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""

    @property
    def snr_db(self) -> float:
        """Energy of the decoded weights over that of what is lost beside them, in dB."""

    def part(self, window: Window) -> "KeptWeight":
        """Some of its rows and columns, in the same memory."""

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x @ W.T + bias: (tokens, cols) to (tokens, rows)."""

    def decoded(self, dtype: torch.dtype) -> Tensor | None:
        """W, (rows, cols) of `dtype`, which must not be changed."""

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Rows of W, (indices.numel(), cols) of `dtype`; IndexError if one is outside."""


@dataclass(frozen=True)
class DenseWeight:
    """A decoded weight (rows, cols); see `KeptWeight`."""

    window: Window
    weight: Tensor
    snr_db: float = float("inf")
    form: str = "dense"

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.weight.nbytes

    def part(self, window: Window) -> "DenseWeight":
        """Some of its rows and columns, in the same memory."""
        return DenseWeight(window, self.weight[self.window.slices_of(window)])

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x @ W.T + bias: (tokens, cols) to (tokens, rows)."""
        weight = self.decoded(x.dtype)
        return None if weight is None else torch.nn.functional.linear(x, weight, bias)

    def decoded(self, dtype: torch.dtype) -> Tensor | None:
        """W, (rows, cols) of `dtype`, which must not be changed."""
        if dtype == self.weight.dtype:
            return self.weight
        # From a narrower dtype it would not be what the bitstream decodes to.
        return self.weight.to(dtype) if self.weight.dtype == torch.float32 else None

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Rows of W, (indices.numel(), cols) of `dtype`; IndexError if one is outside."""
        weight = self.decoded(dtype)
        if weight is None:
            return None
        return torch.nn.functional.embedding(indices.reshape(-1), weight)


KEPT: dict[int, dict[Window, KeptWeight]] = {}
"""By serial number of the `OpenedMatrix`; those of which nothing is kept are not in it."""

_watched: set[int] = set()  # serial numbers of matrices that are dropped from `KEPT` when freed


def find(matrix: OpenedMatrix, window: Window, device: torch.device) -> KeptWeight | None:
    """What is kept of a window of a matrix, for use on a device; None if nothing is."""
    weights = KEPT.get(matrix.serial)
    if weights is None or device.type != "cpu":
        return None
    found = weights.get(window)
    if found is not None:
        return found
    for kept in weights.values():
        if kept.window.holds(window):
            return kept.part(window)
    return None


def make(matrix: OpenedMatrix, window: Window, form: str, dtype: torch.dtype) -> KeptWeight:
    """Decode a weight once, to be kept.

    Args:
        form: "int8" or "dense".
        dtype: of a dense weight.

    Raises:
        CodecError: a tile is corrupt.
    """
    if form == "int8":
        return int8_weight(matrix, window)
    return DenseWeight(window, choice.decode(matrix, window, dtype, torch.device("cpu")))


def keep(matrix: OpenedMatrix, weight: KeptWeight) -> None:
    """Use a weight in the place of its bitstream, as long as that is not changed."""
    if matrix.serial not in _watched:
        _watched.add(matrix.serial)
        weakref.finalize(matrix, _forget, matrix.serial).atexit = False
    KEPT.setdefault(matrix.serial, {})[weight.window] = weight
    operators.forget()


def forget(matrix: OpenedMatrix, window: Window) -> None:
    """Use the bitstream again."""
    weights = KEPT.get(matrix.serial, {})
    if weights.pop(window, None) is not None:
        operators.forget()
    if not weights:
        KEPT.pop(matrix.serial, None)


def _forget(serial: int) -> None:
    KEPT.pop(serial, None)
    _watched.discard(serial)
