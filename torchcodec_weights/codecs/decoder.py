"""The interface of decoders for devices, and the matrix that they are given.

Besides the CPU's decoder, a codec can have two kinds. A `Decoder` decodes matrices, for example by
kernels that read the bitstream in device memory (`BaseCodec.decoders`). A `DeviceDecoder` turns
streams of pictures into samples (`SampleCodec.device_decoder`); the arithmetic from samples to
weights is the same for all of these. `decoders/choice.py` uses the first decoder that is available
and accepts the matrix. The CPU accepts every matrix and comes last.
"""

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchcodec_weights.codecs.records import StoredMatrix
from torchcodec_weights.format.container import Header
from torchcodec_weights.format.tiling import Window


class DecodableMatrix(Protocol):
    """An encoded matrix with its header read and checked (`matrix/opened.py`)."""

    @property
    def header(self) -> Header:
        """What the container says of itself."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """qdata, scale, zero_point and act_pre_scale, where the weight is."""

    def stored(self) -> StoredMatrix:
        """The container on the host, read for a codec."""

    def tiles(self, first_row: int, end_row: int) -> range:
        """The tiles that hold some rows.

        Raises:
            ValueError: the matrix has no such rows.
            CodecError: one of these tiles was left out.
        """

    def row_order(self, first: int, end: int) -> NDArray[np.uint32] | None:
        """uint32 (end − first,): which row of a tile, counted from `first`, codecs got at each
        place; None if as in the matrix."""

    def release_host(self) -> None:
        """Say that the host's copy of the container is not needed at the next use."""


class Decoder(ABC):
    """Decodes matrices on a device. One that it refuses goes to the next decoder, last the CPU.

    Attributes:
        name: as shown by `available_codecs()` and in reports.
        graph_safe: whether it can be captured in a CUDA graph: from a matrix's second use on, it
            works in the current stream and does nothing on the host.
    """

    name: str
    graph_safe: bool = False

    @abstractmethod
    def missing(self, device: torch.device) -> str | None:
        """Why it is not available on a device: package, driver or chip. None if it is available.

        A message for users: what to install, or what is allowed.
        """

    def refusal(self, matrix: DecodableMatrix, window: Window, device: torch.device) -> str | None:
        """Why it cannot decode this matrix, though it is available. None if it can.

        Raises:
            CodecError: a tile is corrupt.
        """
        return None

    @abstractmethod
    def decode(
        self, matrix: DecodableMatrix, window: Window, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Decode a window of a matrix.

        Returns:
            (window.rows, window.cols) of `dtype` on `device`, contiguous; the current stream may
            use it at once. The bits are those that the CPU's decoder returns.

        Raises:
            ValueError: the matrix has no such rows or columns.
            CodecError: a tile is corrupt, or was left out.
            DecoderError: it failed; the next decoder is tried.
        """

    def rows(
        self, matrix: DecodableMatrix, window: Window, indices: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """Rows of a window of a matrix by index; None if the CPU is to decode them.

        Args:
            indices: integers of any shape, on the device.

        Returns:
            (indices.numel(), window.cols) of `dtype` on the device.

        Raises:
            ValueError, CodecError, DecoderError: as `decode`.
        """
        return None

    def multiply(
        self, matrix: DecodableMatrix, window: Window, x: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        """x @ W.T + bias without storing W; None if W is to be decoded instead.

        Args:
            x: (tokens, window.cols) on the device.
            bias: (window.rows,) of x's dtype, or None.

        Returns:
            (tokens, window.rows) of x's dtype.

        Raises:
            ValueError, CodecError, DecoderError: as `decode`.
        """
        return None
