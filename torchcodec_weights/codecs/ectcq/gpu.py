"""ECTCQ's streams by rows on NVIDIA GPUs, decoded and multiplied where the bitstream lies.

The kernels are in gpu.cu, which says how they work. Their index of tiles and segments is built here
and stored in tensors, as PyTorch is the only allocator of device memory that we use.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchcodec_weights.codecs.common import compiled
from torchcodec_weights.codecs.common.cuda import Kernels, Launch
from torchcodec_weights.codecs.ectcq.kernels import LANES, SLOTS, SYMBOLS, Tables
from torchcodec_weights.codecs.records import FloatArray, StoredMatrix
from torchcodec_weights.format.dtypes import DTYPE_CODES, dtype_name

SOURCE = Path(__file__).with_name("gpu.cu")

MAX_TOKENS = 8
"""Most tokens that are multiplied by a weight that is never stored: of more, decoding it and cuBLAS
are faster (studies/gpu.md)."""

DTYPES = {getattr(torch, name): code for name, code in DTYPE_CODES.items()}
"""Types that the kernels write weights in and multiply, with their codes in gpu.cu."""

WARPS = 16
"""Most warps of a block, as in gpu.cu."""

BLOCKS = 2
"""Blocks of so many warps that a multiprocessor holds."""

SLOTS_BYTES = 2 * SLOTS * 8
"""Shared memory that a block needs for its slots."""

MAX_BYTES = 2**32 - 1
"""Of a container: places in it are of 32 bits."""

HEAD = 4 + 4 * LANES
"""Bytes of a payload before its words."""

# A segment takes 184 bytes of index. At 128 steps that is 0.36 bits a weight, and a matrix of
# 4096 x 4096 has 4,096 of them, 31 for each multiprocessor of an H100: warps hide each other's
# latency.
_SEGMENTS = 4096
_SHORTEST, _LONGEST = 128, 1024  # steps

_SEGMENT = np.dtype(
    [
        ("place", "<u8"),
        ("words", "<u4"),
        ("count", "<u4"),
        ("reading", "<u4"),
        ("outliers", "<u4"),
    ]
)
_TILE = np.dtype([("payload", "<u4"), ("end", "<u4"), ("first", "<u4"), ("last", "<u4")])


class _DeviceMatrix(ctypes.Structure):
    """DeviceMatrix of gpu.cu."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("tiles", ctypes.c_uint64),
        ("segments", ctypes.c_uint64),
        ("states", ctypes.c_uint64),
        ("trellis", ctypes.c_uint64),
        ("outlier_places", ctypes.c_uint64),
        ("outlier_values", ctypes.c_uint64),
        ("outlier_changes", ctypes.c_uint64),
        ("row_scale", ctypes.c_uint64),
        ("col_scale", ctypes.c_uint64),
        ("zero_point", ctypes.c_uint64),
        ("rows", ctypes.c_uint64),
        ("cols", ctypes.c_uint64),
        ("row_stride", ctypes.c_uint32),
        ("col_stride", ctypes.c_uint32),
        ("feedback", ctypes.c_uint32),
        ("input", ctypes.c_uint32),
        ("runs", ctypes.c_uint32 * (2 * SYMBOLS)),
        ("values", ctypes.c_float * (2 * SYMBOLS)),
    )


def _runs(tables: Tables) -> Any:
    """Slots of each symbol: the first one | how many << 16, by union quantizer and symbol."""
    runs = (ctypes.c_uint32 * (2 * SYMBOLS))()
    for slot, entry in enumerate(tables.slots):
        if not entry >> 12 & 0xFFF:
            symbol = slot // SLOTS * SYMBOLS + (entry >> 24)
            runs[symbol] = slot % SLOTS | (entry & 0xFFF) << 16
    return runs


@cache
def kernels(device: int) -> Kernels:
    """The kernels of gpu.cu, compiled for a device at the first call."""
    return Kernels(SOURCE, device)


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """The bytes of an array on a device."""
    contents = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    return torch.from_numpy(contents.copy()).to(device)


def allocate(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, str]:
    """A buffer of weights for a kernel, of `dtype` or float32, and the name of its dtype."""
    native = dtype if dtype in DTYPES else torch.float32
    return torch.empty(rows, cols, dtype=native, device=device), dtype_name(native)


def grid(warps: int, device: torch.device) -> tuple[int, int]:
    """Blocks of a kernel and threads of a block, all of which run at the same time.

    Args:
        warps: that have something to do. If they are more than a device holds, each does several
            things.
    """
    most = BLOCKS * multiprocessors(device)
    own = min(WARPS, -(-warps // most))
    return min(most, -(-warps // own)), own * LANES


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 of a CPU, where tests run the kernels."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def wanted_steps(weights: int, shortest: int) -> int:
    """Steps that a segment of a matrix of so many weights should have, `shortest` at least."""
    return int(np.clip(weights // LANES // _SEGMENTS, shortest, _LONGEST))


def segment_steps(weights: int, cols: int) -> int:
    """Steps of a segment; a segment is whole rows if the columns are a multiple of the lanes.

    Args:
        weights: of the matrix.
    """
    wanted = wanted_steps(weights, _SHORTEST)
    row, rest = divmod(cols, LANES)
    return wanted if rest else max(1, round(wanted / row)) * row


def build_index(
    matrix: StoredMatrix, outlier_places: NDArray[np.uint64]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Tiles and segments of a matrix for gpu.cu, whose index kernel fills in the rest of them.

    Args:
        matrix: tiles without a payload are left out.
        outlier_places: in the matrix, row-major, increasing.

    Returns:
        Tiles (tiles,), and segments (segments + 1,), of which the last only ends the outliers.

    Raises:
        CodecError: a stream is shorter than its head, or its tail longer than the stream.
    """
    count = len(matrix.offsets)
    present = np.flatnonzero(matrix.payload_sizes)
    first_rows = np.arange(count + 1, dtype=np.uint64) * matrix.rows // count
    places = first_rows[present] * matrix.cols
    weights = (first_rows[present + 1] - first_rows[present]) * matrix.cols
    offsets = matrix.offsets[present].astype(np.uint64)
    ends = offsets + matrix.payload_sizes[present]
    steps = -(-weights.astype(np.int64) // LANES)
    data = np.frombuffer(matrix.data, np.uint8)
    short = matrix.payload_sizes[present] < HEAD
    if short.any():
        compiled.check("ectcq", compiled.TOO_SHORT, int(present[np.argmax(short)]))
    tails = data[offsets[:, None] + np.arange(4, dtype=np.uint64)].copy().view("<u4")[:, 0]
    if (tails > steps).any():
        compiled.check("ectcq", compiled.BAD_HEADER, int(present[np.argmax(tails > steps)]))
    stride = segment_steps(matrix.rows * matrix.cols, matrix.cols)
    parts = -(-steps // stride)
    ends_of_tiles = np.cumsum(parts)
    tiles = np.empty(len(present), _TILE)
    tiles["payload"] = offsets
    tiles["end"] = ends
    tiles["first"] = ends_of_tiles - parts
    tiles["last"] = ends_of_tiles
    segments = np.zeros(int(parts.sum()) + 1, _SEGMENT)
    body = segments[:-1]
    tile = np.repeat(np.arange(len(present)), parts)
    step = (np.arange(len(body)) - tiles["first"][tile]) * stride
    body["words"] = offsets[tile] + HEAD  # where the tile begins; the kernel knows the rest
    body["place"] = places[tile] + (step * LANES).astype(np.uint64)
    body["count"] = np.minimum(weights[tile].astype(np.int64) - step * LANES, stride * LANES)
    body["reading"] = np.clip(steps[tile] - tails[tile] - step, 0, stride)
    body["outliers"] = np.searchsorted(outlier_places, body["place"])
    segments[-1]["outliers"] = len(outlier_places)
    return tiles, segments


class ResidentMatrix:
    """An encoded matrix on a device, indexed: it decodes and multiplies without the host.

    Args:
        matrix: its tiles checked; here it is only checked that a stream is read to its end.
        tables: of its entropy model.
        outlier_places: uint64, in the matrix, row-major, increasing.
        outlier_values: float32, the same number.
        qdata: uint8, the container, on the device.
        launch: starts kernels there.

    Raises:
        CodecError: a stream does not fit its weights.
    """

    def __init__(
        self,
        matrix: StoredMatrix,
        tables: Tables,
        outlier_places: NDArray[np.uint64],
        outlier_values: FloatArray,
        qdata: Tensor,
        launch: Launch,
    ) -> None:
        tiles, segments = build_index(matrix, outlier_places)
        self._device, self._launch = qdata.device, launch
        self._cols = matrix.cols
        self._places = segments["place"][:-1].copy()
        count = self.segments
        self._tensors = {
            "data": qdata.detach(),
            "tiles": upload(tiles, self._device),
            "segments": upload(segments, self._device),
            "states": torch.empty(count * LANES, dtype=torch.int32, device=self._device),
            "trellis": torch.empty(count * LANES, dtype=torch.uint8, device=self._device),
            "outlier_places": upload(outlier_places, self._device),
            "outlier_values": upload(outlier_values, self._device),
            "outlier_changes": upload(np.zeros_like(outlier_values), self._device),
            "row_scale": upload(matrix.row_scale, self._device),
            "col_scale": upload(matrix.col_scale, self._device),
        }
        if matrix.zero_point is not None:
            self._tensors["zero_point"] = upload(matrix.zero_point, self._device)
        header = _DeviceMatrix(
            **{name: tensor.data_ptr() for name, tensor in self._tensors.items()},
            size=len(matrix.data),
            rows=matrix.rows,
            cols=matrix.cols,
            row_stride=int(len(matrix.row_scale) > 1),
            col_stride=int(len(matrix.col_scale) > 1),
            feedback=tables.feedback,
            input=tables.input,
            runs=_runs(tables),
            values=tables.values,
        )
        self._matrix = upload(np.frombuffer(bytes(header), np.uint8), self._device)
        self._index(len(tiles), present=np.flatnonzero(matrix.payload_sizes))

    @property
    def segments(self) -> int:
        """Number of segments; all of them can be decoded at the same time."""
        return len(self._places)

    def _index(self, tiles: int, present: NDArray[np.intp]) -> None:
        status = torch.full((tiles,), -1, dtype=torch.int32, device=self._device)
        self._run("ectcq_index", tiles, tiles, status.data_ptr())
        results = status.cpu().numpy()
        if results.any():
            first = int(np.flatnonzero(results)[0])
            compiled.check("ectcq", int(results[first]), int(present[first]))

    def _run(self, kernel: str, warps: int, *arguments: int) -> None:
        blocks, threads = grid(warps, self._device)
        matrix = self._matrix.data_ptr()
        self._launch(
            kernel, blocks, threads, matrix, *arguments, shared=SLOTS_BYTES, programmatic=True
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All memory of the device that kernels read at each use, the container's too."""
        return [*self._tensors.values(), self._matrix]

    @property
    def data_address(self) -> int:
        """Where the container was when the matrix was indexed."""
        return self._tensors["data"].data_ptr()

    def _segments_of(self, first: int, end: int) -> tuple[int, int]:
        """The range of segments that hold the weights `first` to `end` − 1: start and stop."""
        start = int(np.searchsorted(self._places, np.uint64(first), "right")) - 1
        return start, int(np.searchsorted(self._places, np.uint64(end), "left"))

    def decode(self, first_row: int, end_row: int, dtype: torch.dtype) -> Tensor:
        """Decode rows.

        Returns:
            (end_row − first_row, cols) of `dtype` on the device.
        """
        first, end = first_row * self._cols, end_row * self._cols
        start, stop = self._segments_of(first, end)
        out, name = allocate(end_row - first_row, self._cols, dtype, self._device)
        # fmt: off
        self._run(
            f"ectcq_decode_{name}", stop - start, out.data_ptr(), start, stop, first, end
        )
        # fmt: on
        return out.to(dtype)

    @property
    def whole_rows(self) -> bool:
        """Whether `gather` can be used: a row must be of whole steps."""
        return self._cols % LANES == 0

    @property
    def multiplies(self) -> bool:
        """Whether `multiply` can be used: a row must be of whole steps."""
        return self.whole_rows

    def gather(self, numbers: Tensor, first_row: int, rows: int, dtype: torch.dtype) -> Tensor:
        """Decode rows by their numbers, if `whole_rows`.

        Args:
            numbers: int64 (n,) on the device, 0 to rows − 1, counted from `first_row` on. Others
                end the kernel with an error, which CUDA reports at a later call.

        Returns:
            (n, cols) of `dtype` on the device.
        """
        numbers, count = numbers.contiguous(), len(numbers)
        out, name = allocate(count, self._cols, dtype, self._device)
        if count:
            self._run(
                f"ectcq_gather_{name}",
                count,
                numbers.data_ptr(),
                count,
                out.data_ptr(),
                self.segments,
                first_row,
                rows,
            )
        return out.to(dtype)

    def multiply(
        self,
        x: Tensor,
        first_row: int,
        end_row: int,
        first_col: int,
        bias: Tensor | None,
    ) -> Tensor:
        """x · Wᵀ + bias with W never stored, if it `multiplies`. Sums are of float32.

        Args:
            x: (tokens, width), at most `MAX_TOKENS` tokens; float32, float16 or bfloat16; for the
                columns from `first_col` on.
            bias: (end_row − first_row,) of x's dtype, or None.

        Returns:
            (tokens, end_row − first_row) of x's dtype.
        """
        tokens, width = x.shape
        padded = 1 << (tokens - 1).bit_length()
        x = x.detach().contiguous()
        scaled = torch.empty(padded * self._cols, dtype=torch.float32, device=self._device)
        threads = WARPS * LANES
        self._launch(
            "ectcq_scale",
            -(-self._cols // threads),
            threads,
            self._matrix.data_ptr(),
            x.data_ptr(),
            scaled.data_ptr(),
            DTYPES[x.dtype],
            tokens,
            padded,
            first_col,
            width,
        )
        totals = x.float().sum(1) if "zero_point" in self._tensors else None
        y = torch.empty(tokens, end_row - first_row, dtype=x.dtype, device=self._device)
        start, stop = self._segments_of(first_row * self._cols, end_row * self._cols)
        if bias is not None:
            bias = bias.detach().contiguous()
        self._run(
            f"ectcq_multiply_{padded}",
            stop - start,
            scaled.data_ptr(),
            0 if totals is None else totals.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            DTYPES[x.dtype],
            tokens,
            start,
            stop,
            first_row,
            end_row,
        )
        return y
