"""What an encoded matrix decodes to, some rows at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchcodec_weights.decoders.cpu import decode_matrix
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.opened import OpenedMatrix

BAND = 2**21
"""About how many weights are decoded at once."""


def decode_bands(matrix: OpenedMatrix, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Decode all of a matrix, some tiles at a time, so that not all of it is in memory.

    Returns:
        The first row of each band, and its rows: (rows, cols) of `dtype` on the CPU.

    Raises:
        CodecError: a tile is corrupt.
    """
    header = matrix.header
    first = 0
    for start in [*sorted({block.first_row for block in header.blocks})[1:], header.rows]:
        if start == header.rows or (start - first) * header.cols >= BAND:
            window = Window(first, start - first, 0, header.cols)
            yield first, decode_matrix(matrix, window, dtype)
            first = start
