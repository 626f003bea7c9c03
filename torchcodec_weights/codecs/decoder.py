"""What decodes on a device: the interface that a codec's decoders have, and what they get.

A codec offers decoders besides the CPU's, of two kinds. A `Decoder` decodes matrices: kernels on a
bitstream where it lies are such (`BaseCodec.decoders`). A `DeviceDecoder` turns streams of pictures
into samples (`SampleCodec.device_decoder`); the arithmetic from samples to weights is the same for
all. `decoders/choice.py` takes the first that is there and takes the matrix; the CPU, which takes
everything, comes last.
"""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from torchcodec_weights.codecs.records import StoredMatrix
from torchcodec_weights.format.container import Header
from torchcodec_weights.format.tiling import Window


class EncodedMatrix(Protocol):
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

    def release_host(self) -> None:
        """Say that the host's copy of the container is not needed at the next use."""


class Decoder(ABC):
    """Decodes matrices on a device; what it cannot do is done by the next one, at last by the CPU.

    Attributes:
        name: as it shows in `available_codecs()` and in reports.
        graph_safe: whether a CUDA graph can hold it: at a use that is not a matrix's first, it
            works in the current stream and asks nothing of the host.
        exact: whether it returns the weights that the CPU's decoder returns, bit for bit. Where
            not, it is taken only if `use_decoder` forces it.
    """

    name: str
    graph_safe: bool = False
    exact: bool = True

    @abstractmethod
    def missing(self, device: torch.device) -> str | None:
        """Why it is not there on a device: package, driver or chip. None if it is.

        In words for users: what to install, or what is allowed.
        """

    def refusal(self, matrix: EncodedMatrix, window: Window, device: torch.device) -> str | None:
        """Why it does not take a matrix, of those that it takes where it is there. None if it does.

        Raises:
            CodecError: a tile is corrupt.
        """
        return None

    @abstractmethod
    def decode(
        self, matrix: EncodedMatrix, window: Window, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Decode a part of a matrix.

        Returns:
            (window.rows, window.cols) of `dtype` on `device`, contiguous; the current stream may
            use it at once.

        Raises:
            ValueError: the matrix has no such rows or columns.
            CodecError: a tile is corrupt, or was left out.
            DecoderError: it failed; another decoder is to be asked.
        """

    def rows(
        self, matrix: EncodedMatrix, window: Window, indices: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """Rows of a part of a matrix by their numbers; None where the CPU is to find them.

        Args:
            indices: integers of any shape, on the device.

        Returns:
            (indices.numel(), window.cols) of `dtype` on the device.

        Raises:
            ValueError, CodecError, DecoderError: as `decode`.
        """
        return None

    def multiply(
        self, matrix: EncodedMatrix, window: Window, x: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        """x @ W.T + bias without ever storing W; None where W is to be decoded instead.

        Args:
            x: (tokens, window.cols) on the device.
            bias: (window.rows,) of x's dtype, or None.

        Returns:
            (tokens, window.rows) of x's dtype.

        Raises:
            ValueError, CodecError, DecoderError: as `decode`.
        """
        return None
