"""ECTCQ's decoder on CUDA devices: a bitstream stays there, checked and indexed at its first use.

From then on it is decoded and multiplied there, in the current stream and without the host, so that
a CUDA graph can hold it. gpu.cu has the kernels; gpu.py and gpu_columns.py build the index that
they read, for streams by rows and by columns.
"""

import threading
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from torchcodec_weights.codecs.common import cuda, side_stream
from torchcodec_weights.codecs.common.cuda import Launch
from torchcodec_weights.codecs.decoder import DecodableMatrix, Decoder
from torchcodec_weights.codecs.ectcq import gpu
from torchcodec_weights.codecs.ectcq.columns import decoder_classes_of_matrix, is_by_columns
from torchcodec_weights.codecs.ectcq.decode import decode_tiles
from torchcodec_weights.codecs.ectcq.gpu import DTYPES, MAX_TOKENS, ResidentMatrix
from torchcodec_weights.codecs.ectcq.gpu_columns import ResidentColumns
from torchcodec_weights.codecs.ectcq.model import tables_of_matrix
from torchcodec_weights.errors import DecoderError
from torchcodec_weights.format import container
from torchcodec_weights.format.dtypes import dtype_name
from torchcodec_weights.format.tiling import Window


class _Indexed(NamedTuple):
    """A matrix on a device, and the streams that use it."""

    matrix: ResidentMatrix | ResidentColumns
    uses: side_stream.StreamUses


class CudaKernels(Decoder):
    """Kernels that read the bitstream in the device's memory."""

    name = "ectcq (CUDA kernels)"
    graph_safe = True

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._indexed: WeakKeyDictionary[DecodableMatrix, _Indexed] = WeakKeyDictionary()
        self._compared: set[tuple[torch.device, bool]] = set()

    def missing(self, device: torch.device) -> str | None:
        return cuda.missing()

    def refusal(self, matrix: DecodableMatrix, window: Window, device: torch.device) -> str | None:
        if matrix.tensors[0].device != device:
            return f"its bitstream is on {matrix.tensors[0].device}"
        if matrix.header.total_size > gpu.MAX_BYTES:
            size = matrix.header.total_size
            return f"its bitstream has {size} bytes: allowed: at most {gpu.MAX_BYTES}"
        return "its tiles are blocks (tile_shape)" if matrix.header.across != 1 else None

    def decode(
        self, matrix: DecodableMatrix, window: Window, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        container.check_window(matrix.header, window)
        end_row = window.first_row + window.rows
        matrix.tiles(window.first_row, end_row)
        resident = self.resident(matrix, device)
        rows = resident.decode(window.first_row, end_row, dtype)
        return rows[:, window.first_col : window.first_col + window.cols].contiguous()

    def rows(
        self, matrix: DecodableMatrix, window: Window, indices: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """As `Decoder.rows`, but CUDA reports an index out of range at a later call.

        None for streams by columns, in which a row lies in all segments of its tile, and where a
        row is not of whole steps.
        """
        container.check_window(matrix.header, window)
        if is_by_columns(matrix.header.private):
            return None
        matrix.tiles(window.first_row, window.first_row + window.rows)
        resident = self.resident(matrix, indices.device)
        if isinstance(resident, ResidentColumns) or not resident.whole_rows:
            return None
        numbers = indices.reshape(-1).to(torch.int64)
        rows = resident.gather(numbers, window.first_row, window.rows, dtype)
        return rows[:, window.first_col : window.first_col + window.cols]

    def multiply(
        self, matrix: DecodableMatrix, window: Window, x: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        if not 1 <= len(x) <= MAX_TOKENS or x.dtype not in DTYPES:
            return None
        container.check_window(matrix.header, window)
        end_row = window.first_row + window.rows
        matrix.tiles(window.first_row, end_row)
        resident = self.resident(matrix, x.device)
        if not resident.multiplies:
            return None
        return resident.multiply(x, window.first_row, end_row, window.first_col, bias)

    def resident(
        self, matrix: DecodableMatrix, device: torch.device
    ) -> ResidentMatrix | ResidentColumns:
        """The matrix indexed on a device, for use in its current stream.

        The first call for a matrix reads its bitstream on the host.

        Raises:
            CodecError: a tile is corrupt, or this first call comes while a CUDA graph is captured.
            DecoderError: the kernels do not compile for the device, cannot be started, or return
                other weights than the CPU.
        """
        with self._lock:
            known = self._indexed.get(matrix)
            address = matrix.tensors[0].data_ptr()
            if known is None or known.matrix.data_address != address:
                cuda.refuse_first_use(device)
                made = side_stream.run(lambda: self._index(matrix, device), device)
                known = _Indexed(made, side_stream.StreamUses(made.tensors))
                self._indexed[matrix] = known
                matrix.release_host()
        known.uses.record_current()
        return known.matrix

    def _index(
        self, matrix: DecodableMatrix, device: torch.device
    ) -> ResidentMatrix | ResidentColumns:
        made = index_matrix(matrix, gpu.kernels(device.index))
        kind = device, is_by_columns(matrix.header.private)
        if kind not in self._compared:
            compare_with_cpu(matrix, made)
            self._compared.add(kind)
        return made


def index_matrix(matrix: DecodableMatrix, launch: Launch) -> ResidentMatrix | ResidentColumns:
    """Check all tiles of a matrix in ECTCQ, and index it on the device where its bitstream is.

    Args:
        matrix: with tiles of whole rows.
        launch: starts kernels on that device.

    Raises:
        CodecError: a tile is corrupt.
    """
    header, stored = matrix.header, matrix.stored()
    present = np.flatnonzero(header.tiles["payload_size"]).tolist()
    outliers = {i: container.read_tile(stored.data, header, i)[1] for i in present}
    places, values = container.exact_weights(header, outliers)
    exact = torch.from_numpy(values).view(getattr(torch, header.dtype))[:, 0].float().numpy()
    found = places.astype(np.uint64), exact, matrix.tensors[0], launch
    if is_by_columns(header.private):
        return ResidentColumns(stored, decoder_classes_of_matrix(stored), *found)
    return ResidentMatrix(stored, tables_of_matrix(stored), *found)


def compare_with_cpu(matrix: DecodableMatrix, made: ResidentMatrix | ResidentColumns) -> None:
    """Decode the first tile that is here by the kernels and on the CPU, in each dtype.

    Raises:
        DecoderError: a bit differs.
    """
    tile = int(np.flatnonzero(matrix.header.tiles["payload_size"])[0])
    block, stored = matrix.header.blocks[tile], matrix.stored()
    for dtype in DTYPES:
        expected = torch.empty(block.rows, block.cols, dtype=dtype, device="cpu")
        decode_tiles(stored, range(tile, tile + 1), expected.data_ptr(), dtype_name(dtype), 1)
        found = made.decode(block.first_row, block.end_row, dtype).cpu()
        if not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
            raise DecoderError(
                f"{CudaKernels.name} on {made.tensors[0].device} returns other weights than the CPU"
            )


KERNELS = CudaKernels()
