"""ECTCQ's streams by columns on NVIDIA GPUs, decoded and multiplied where the bitstream lies.

The kernels are in the second half of gpu.cu, which says what segments, sets and parts are.
"""

import ctypes
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchcodec_weights.codecs.common import compiled
from torchcodec_weights.codecs.common.cuda import Launch
from torchcodec_weights.codecs.ectcq.column_kernels import DecoderClasses
from torchcodec_weights.codecs.ectcq.columns import groups_of
from torchcodec_weights.codecs.ectcq.gpu import (
    DTYPES,
    HEAD,
    MAX_TOKENS,
    SLOTS_BYTES,
    WARPS,
    allocate,
    upload,
    wanted_steps,
)
from torchcodec_weights.codecs.ectcq.kernels import LANES, SLOTS, SYMBOLS, trellises
from torchcodec_weights.codecs.records import FloatArray, StoredMatrix

_SUMS = 2**22
"""Sums over some columns that a product keeps until all are there: 16 MiB, or as many as it has."""

_SHORTEST = 256  # steps of a segment

_BATCH = 16
"""Rows of which a warp adds up the products together, as in gpu.cu."""

_PRODUCT_BYTES = SLOTS_BYTES + 4 * LANES * (MAX_TOKENS + WARPS * _BATCH)
"""Shared memory of a block of a product: slots, and SharedProduct of gpu.cu; some have 99 KiB."""

_MAX_PADDED = 2**31 - 1
"""Weights of a tile, with eight rows more (docs/bitstream.md)."""

_TILE = np.dtype(
    [
        ("payload", "<u8"),
        ("end", "<u8"),
        ("row", "<u4"),
        ("height", "<u4"),
        ("reading", "<u4"),
        ("padding", "<u4"),
    ]
)
_OUTLIER = np.dtype([("row", "<u4"), ("position", "<u4"), ("value", "<f4")])
_CLASS = np.dtype([("runs", "<u4", 2 * SYMBOLS), ("values", "<f4", 2 * SYMBOLS)])


class _DeviceColumns(ctypes.Structure):
    """DeviceColumns of gpu.cu."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("tiles", ctypes.c_uint64),
        ("words", ctypes.c_uint64),
        ("states", ctypes.c_uint64),
        ("trellis", ctypes.c_uint64),
        ("first_outliers", ctypes.c_uint64),
        ("outliers", ctypes.c_uint64),
        ("classes", ctypes.c_uint64),
        ("class_of_group", ctypes.c_uint64),
        ("column_order", ctypes.c_uint64),
        ("row_scale", ctypes.c_uint64),
        ("col_scale", ctypes.c_uint64),
        ("zero_point", ctypes.c_uint64),
        ("rows", ctypes.c_uint64),
        ("cols", ctypes.c_uint64),
        ("row_stride", ctypes.c_uint32),
        ("col_stride", ctypes.c_uint32),
        ("feedback", ctypes.c_uint32),
        ("input", ctypes.c_uint32),
        ("groups", ctypes.c_uint32),
        ("set_groups", ctypes.c_uint32),
        ("sets", ctypes.c_uint32),
        ("parts", ctypes.c_uint32),
    )


def division(height: int, groups: int, weights: int) -> tuple[int, int]:
    """How tiles are divided into segments of about as many steps as those of streams by rows.

    Args:
        height: rows of the highest tile.
        groups: of 32 columns.
        weights: of the matrix.

    Returns:
        Into how many parts a tile's rows are divided, and how many groups a segment has. One of
        them is 1.
    """
    wanted = wanted_steps(weights, _SHORTEST)
    return max(1, height // wanted), min(groups, max(1, round(wanted / height)))


def build_tiles(matrix: StoredMatrix) -> NDArray[Any]:
    """Tiles of a matrix for gpu.cu.

    Args:
        matrix: tiles without a payload are left out.

    Raises:
        CodecError: a stream is shorter than its head, its tail longer than the stream, or a tile
            larger than streams by columns may be.
    """
    count = len(matrix.offsets)
    present = np.flatnonzero(matrix.payload_sizes)
    first_rows = np.arange(count + 1, dtype=np.uint64) * matrix.rows // count
    heights = (first_rows[1:] - first_rows[:-1]).astype(np.int64)
    if (int(heights.max()) + 8) * matrix.cols > _MAX_PADDED:
        compiled.check("ectcq", compiled.BAD_HEADER, int(np.argmax(heights)))
    short = matrix.payload_sizes[present] < HEAD
    if short.any():
        compiled.check("ectcq", compiled.TOO_SHORT, int(present[np.argmax(short)]))
    offsets = matrix.offsets[present].astype(np.uint64)
    data = np.frombuffer(matrix.data, np.uint8)
    tails = data[offsets[:, None] + np.arange(4, dtype=np.uint64)].copy().view("<u4")[:, 0]
    steps = heights[present] * groups_of(matrix.cols)
    if (tails > steps).any():
        compiled.check("ectcq", compiled.BAD_HEADER, int(present[np.argmax(tails > steps)]))
    tiles = np.zeros(len(present), _TILE)
    tiles["payload"] = offsets
    tiles["end"] = offsets + matrix.payload_sizes[present]
    tiles["row"] = first_rows[present]
    tiles["height"] = heights[present]
    tiles["reading"] = steps - tails
    return tiles


def class_tables(classes: DecoderClasses) -> NDArray[Any]:
    """The tables of all classes for gpu.cu.

    Raises:
        CodecError: frequencies of a class do not add up.
    """
    made = np.zeros(len(classes.classes), _CLASS)
    for own, one in zip(made, classes.classes, strict=True):
        frequency = np.frombuffer(one.frequency, np.uint16).reshape(2, SYMBOLS).astype(np.uint32)
        if (frequency.sum(1) != SLOTS).any() or (frequency >= SLOTS).any():
            compiled.check("ectcq", compiled.BAD_HEADER)
        starts = np.cumsum(frequency, axis=1, dtype=np.uint32) - frequency
        own["runs"] = (starts | frequency << np.uint32(16)).reshape(-1)
        own["values"] = np.frombuffer(one.values, np.float32)
    return made


class ResidentColumns:
    """A matrix in a stream by columns on a device, indexed: it works without the host.

    Args:
        matrix: its tiles checked; here it is only checked that a stream is read to its end.
        classes: of its private data and step.
        outlier_places: uint64, in the matrix's own order, row-major, increasing.
        outlier_values: float32, the same number.
        qdata: uint8, the container, on the device.
        launch: starts kernels there.

    Raises:
        CodecError: a stream does not fit its weights.
    """

    def __init__(
        self,
        matrix: StoredMatrix,
        classes: DecoderClasses,
        outlier_places: NDArray[np.uint64],
        outlier_values: FloatArray,
        qdata: Tensor,
        launch: Launch,
    ) -> None:
        tiles = build_tiles(matrix)
        self._device, self._launch = qdata.device, launch
        self._cols, groups = matrix.cols, groups_of(matrix.cols)
        height = -(-matrix.rows // len(matrix.offsets))
        weights = matrix.rows * matrix.cols
        self._parts, set_groups = division(height, groups, weights)
        self._sets = -(-groups // set_groups)
        self._first_rows = tiles["row"].astype(np.int64)
        self._end_rows = self._first_rows + tiles["height"]
        order = matrix.column_order
        if order is None:
            order = np.arange(matrix.cols, dtype=np.uint32)
        positions = np.empty(matrix.cols, np.uint32)
        positions[order] = np.arange(matrix.cols, dtype=np.uint32)
        count = self.segments
        rows, columns = np.divmod(outlier_places.astype(np.int64), matrix.cols)
        tile = np.searchsorted(self._first_rows, rows, "right") - 1
        group = positions[columns].astype(np.int64) // LANES
        # Row r is in the last part that begins at r or before, at ⌊height · part / parts⌋.
        row = rows - self._first_rows[tile]
        part = ((row + 1) * self._parts - 1) // tiles["height"][tile]
        segment = (tile * self._sets + group // set_groups) * self._parts + part
        by_segment = np.lexsort((row, group, segment))
        outliers = np.empty(len(rows), _OUTLIER)
        outliers["row"] = rows[by_segment]
        outliers["position"] = positions[columns[by_segment]]
        outliers["value"] = outlier_values[by_segment]
        first_outliers = np.searchsorted(segment[by_segment], np.arange(count + 1))
        kept = count * LANES
        self._tensors = {
            "data": qdata.detach(),
            "tiles": upload(tiles, self._device),
            "words": torch.empty(count, dtype=torch.int32, device=self._device),
            "states": torch.empty(kept, dtype=torch.int32, device=self._device),
            "first_outliers": upload(first_outliers.astype(np.uint32), self._device),
            "outliers": upload(outliers, self._device),
            "classes": upload(class_tables(classes), self._device),
            "class_of_group": upload(classes.of_group, self._device),
            "column_order": upload(order, self._device),
            "row_scale": upload(matrix.row_scale, self._device),
            "col_scale": upload(matrix.col_scale, self._device),
        }
        if self._parts > 1:  # else all segments begin with state 0
            trellis = torch.empty(kept, dtype=torch.uint8, device=self._device)
            self._tensors["trellis"] = trellis
        if matrix.zero_point is not None:
            self._tensors["zero_point"] = upload(matrix.zero_point, self._device)
        h0, h1 = trellises()[classes.states]
        header = _DeviceColumns(
            **{name: tensor.data_ptr() for name, tensor in self._tensors.items()},
            size=len(matrix.data),
            rows=matrix.rows,
            cols=matrix.cols,
            row_stride=int(len(matrix.row_scale) > 1),
            col_stride=int(len(matrix.col_scale) > 1),
            feedback=h0 >> 1,
            input=h1 >> 1,
            groups=groups,
            set_groups=set_groups,
            sets=self._sets,
            parts=self._parts,
        )
        self._matrix = upload(np.frombuffer(bytes(header), np.uint8), self._device)
        self._index(present=np.flatnonzero(matrix.payload_sizes))

    @property
    def segments(self) -> int:
        """Number of segments; all of them can be decoded at the same time."""
        return len(self._first_rows) * self._sets * self._parts

    @property
    def index_bytes(self) -> int:
        """Device memory that the index takes, the scales and the outliers not counted."""
        parts = ("tiles", "words", "states", "trellis", "first_outliers")
        return sum(self._tensors[name].nbytes for name in parts if name in self._tensors)

    @property
    def multiplies(self) -> bool:
        """Whether `multiply` can be used: it takes tensor cores with TF32."""
        return self._device.type == "cpu" or torch.cuda.get_device_capability(self._device) >= (
            8,
            0,
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All memory of the device that kernels read at each use, the container's too."""
        return [*self._tensors.values(), self._matrix]

    @property
    def data_address(self) -> int:
        """Where the container was when the matrix was indexed."""
        return self._tensors["data"].data_ptr()

    def _index(self, present: NDArray[np.intp]) -> None:
        status = torch.full((len(present),), -1, dtype=torch.int32, device=self._device)
        self._run("ectcq_columns_index", len(present), 1, len(present), status.data_ptr())
        results = status.cpu().numpy()
        if results.any():
            first = int(np.flatnonzero(results)[0])
            compiled.check("ectcq", int(results[first]), int(present[first]))

    def _run(
        self, kernel: str, warps: int, repeats: int, *arguments: int, shared: int = SLOTS_BYTES
    ) -> None:
        """Start `repeats` times as many whole blocks as hold so many warps."""
        own = min(WARPS, warps)
        blocks = -(-warps // own) * repeats
        matrix = self._matrix.data_ptr()
        self._launch(kernel, blocks, own * LANES, matrix, *arguments, shared=shared)

    def _tiles_of(self, first_row: int, end_row: int) -> tuple[int, int]:
        """The range of tiles, of those that are here, that hold some rows: start and stop."""
        start = int(np.searchsorted(self._end_rows, first_row, "right"))
        return start, int(np.searchsorted(self._first_rows, end_row, "left"))

    def decode(self, first_row: int, end_row: int, dtype: torch.dtype) -> Tensor:
        """Decode rows, columns in the matrix's own order.

        Returns:
            (end_row − first_row, cols) of `dtype` on the device.
        """
        start, stop = self._tiles_of(first_row, end_row)
        out, name = allocate(end_row - first_row, self._cols, dtype, self._device)
        self._run(
            f"ectcq_columns_decode_{name}",
            (stop - start) * self._parts,
            self._sets,
            out.data_ptr(),
            start,
            stop,
            first_row,
            end_row,
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
        """x · Wᵀ + bias with W never stored, if it `multiplies`.

        Sums are of float32, the same in each run. An infinity in x gives NaN.

        Args:
            x: (tokens, width), at most `MAX_TOKENS` tokens; float32, float16 or bfloat16; for the
                columns from `first_col` on.
            bias: (end_row − first_row,) of x's dtype, or None.

        Returns:
            (tokens, end_row − first_row) of x's dtype.
        """
        tokens, width = x.shape
        rows = end_row - first_row
        x = x.detach().contiguous()
        start, stop = self._tiles_of(first_row, end_row)
        chunk_sets = -(-self._sets // max(1, min(self._sets, _SUMS // (tokens * rows))))
        chunks = -(-self._sets // chunk_sets)
        sums = torch.empty(chunks * tokens * rows, dtype=torch.float32, device=self._device)
        self._run(
            "ectcq_columns_multiply",
            (stop - start) * self._parts,
            chunks,
            x.data_ptr(),
            DTYPES[x.dtype],
            tokens,
            first_col,
            width,
            sums.data_ptr(),
            chunk_sets,
            start,
            stop,
            first_row,
            end_row,
            shared=_PRODUCT_BYTES,
        )
        totals = x.float().sum(1) if "zero_point" in self._tensors else None
        y = torch.empty(tokens, rows, dtype=x.dtype, device=self._device)
        if bias is not None:
            bias = bias.detach().contiguous()
        threads = WARPS * LANES
        self._launch(
            "ectcq_columns_sum",
            -(-tokens * rows // threads),
            threads,
            self._matrix.data_ptr(),
            sums.data_ptr(),
            chunks,
            0 if totals is None else totals.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            DTYPES[x.dtype],
            tokens,
            first_row,
            rows,
        )
        return y
