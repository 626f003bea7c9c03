"""Container to dense weight: check, decode tiles in parallel, undo the normalization."""

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchcodec_weights import container
from torchcodec_weights.codecs.base import (
    BaseCodec,
    Codec,
    CodecError,
    StoredMatrix,
)
from torchcodec_weights.codecs.registry import codec_names, get_codec
from torchcodec_weights.normalize import decode_scale, denormalize
from torchcodec_weights.policy import check_codec, check_expansion


class Window(NamedTuple):
    """The part of an encoded matrix that a weight is; rows and columns of the matrix."""

    first_row: int
    rows: int
    first_col: int
    cols: int


Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor]


@dataclass(eq=False)
class Matrix:
    """An encoded matrix with its header read and checked, ready to decode.

    Attributes:
        header: what the container says of itself.
        codec: what decodes it.
        tensors: qdata, scale, zero_point and act_pre_scale.
        host: the same on the CPU, for what is decoded from there; None, for what never is, has them
            copied if need be.
        serial: a number that no other has, nor had.
    """

    header: container.Header
    codec: BaseCodec
    tensors: Tensors
    host: Tensors | None
    serial: int = field(default_factory=count().__next__)

    def stored(self) -> StoredMatrix:
        """What a codec needs of it. Made anew for each use: decoded scales take memory."""
        header = self.header
        qdata, scale, zero_point, act_pre_scale = self.host or self.tensors
        # Copies, as the table lies in the header's bytes at any address, and compiled code reads
        # whole words.
        tiles = {name: header.tiles[name].copy() for name in header.tiles.dtype.names or ()}
        return StoredMatrix(
            data=as_array(qdata).data,
            offsets=header.offsets,
            payload_sizes=tiles["payload_size"],
            outlier_sizes=tiles["outliers_size"],
            crcs=tiles["crc"],
            units=tiles["unit"],
            rows=header.rows,
            cols=header.cols,
            row_scale=decode_scale(as_array(scale), header.row_base),
            col_scale=decode_scale(as_array(act_pre_scale), header.col_base),
            zero_point=None if zero_point is None else as_array(zero_point),
            dtype=header.dtype,
            private=header.private,
        )

    @cached_property
    def _some_left_out(self) -> bool:
        """Whether tiles are not here (`container.select_tiles`)."""
        return not self.header.tiles["payload_size"].all()

    @property
    def decodes_whole(self) -> bool:
        """Whether the codec decodes this matrix' tiles together (`BaseCodec.decodes_whole`)."""
        return self.codec.decodes_whole and self.header.across == 1

    def tiles(self, first_row: int, end_row: int) -> range:
        """The tiles that hold some rows.

        Raises:
            ValueError: the matrix has no such rows.
            CodecError: one of these tiles was left out (`container.select_tiles`).
        """
        header = self.header
        if not 0 <= first_row < end_row <= header.rows:
            raise ValueError(
                f"rows {first_row} to {end_row} of a matrix of {header.rows}x{header.cols}"
            )
        grid = header.blocks
        first, last = grid.band_of(first_row), grid.band_of(end_row - 1)
        tiles = range(first * grid.across, (last + 1) * grid.across)
        if self._some_left_out:
            missing = np.flatnonzero(header.tiles["payload_size"][tiles.start : tiles.stop] == 0)
            if len(missing):
                raise CodecError(
                    f"tile {tiles[int(missing[0])]} is not here: this is a slice of a weight, and "
                    f"its rows {first_row} to {end_row} were left out of it"
                )
        return tiles


def open_matrix(
    qdata: Tensor, scale: Tensor, zero_point: Tensor | None, act_pre_scale: Tensor
) -> Matrix:
    """Read and check all but the tiles; once for tensors that do not change.

    Args:
        qdata: uint8 (bytes,), the container.
        scale: uint8 (rows,) or (1,), scale codes.
        zero_point: float32 (rows,) or None.
        act_pre_scale: uint8 (cols,) or (1,), scale codes.

    Raises:
        CodecError: corrupt, from a newer format, or for a codec that is not here.
    """
    fingerprint = _fingerprint(qdata, scale, zero_point, act_pre_scale)
    key = id(qdata)
    known = _opened.get(key)
    if known is not None and known.tensor() is qdata:
        if fingerprint is not None and known.fingerprint == fingerprint:
            return known.matrix
    else:
        known = None
    matrix = _open(qdata, scale, zero_point, act_pre_scale)
    if known is not None and known.matrix.header.raw == matrix.header.raw:
        # The same weight, for which something may be cached, in other tensors.
        known.matrix.tensors, known.matrix.host = matrix.tensors, matrix.host
        matrix = known.matrix

    def forget(ref: weakref.ref[Tensor]) -> None:
        if key in _opened and _opened[key].tensor is ref:
            del _opened[key]

    _opened[key] = _Opened(weakref.ref(qdata, forget), fingerprint, matrix)
    return matrix


class _Opened(NamedTuple):
    tensor: weakref.ref[Tensor]
    fingerprint: tuple[int, ...] | None
    matrix: Matrix


_opened: dict[int, _Opened] = {}


def _fingerprint(*tensors: Tensor | None) -> tuple[int, ...] | None:
    """Changes when a tensor is written to; None where PyTorch does not count that."""
    marks: list[int] = []
    for tensor in tensors:
        if tensor is not None:
            if tensor.is_inference():
                return None
            marks += tensor.data_ptr(), tensor._version
    return tuple(marks)


def _open(qdata: Tensor, scale: Tensor, zero_point: Tensor | None, act_pre_scale: Tensor) -> Matrix:
    refuse_first_use(qdata.device)
    # Aliases, as the tensors themselves must be free to die.
    aliases = (
        qdata.detach(),
        scale.detach(),
        None if zero_point is None else zero_point.detach(),
        act_pre_scale.detach(),
    )
    check_arrays(*aliases)
    host = (
        aliases[0].cpu(),
        aliases[1].cpu(),
        None if aliases[2] is None else aliases[2].cpu(),
        aliases[3].cpu(),
    )
    header = container.read_header(partial(bytes_of, host[0]), len(host[0]))
    vectors = [bytes_of(array) for array in host[1:] if array is not None]
    if container.crc32c(*vectors) != header.vectors_crc:
        raise CodecError("scale, zero_point or act_pre_scale is corrupt or of another matrix")
    for name, array, allowed in (
        ("scale", host[1], (1, header.rows)),
        ("zero_point", host[2], (header.rows,)),
        ("act_pre_scale", host[3], (1, header.cols)),
    ):
        if array is not None and len(array) not in allowed:
            raise CodecError(
                f"{name} of {len(array)} elements does not fit a matrix of "
                f"{header.rows}x{header.cols}: allowed: {' or '.join(map(str, allowed))}"
            )
    check_expansion(header, header.total_size + sum(map(len, vectors)))
    if header.codec not in codec_names():
        raise CodecError(
            f"encoded with the codec {header.codec!r}, which this version of torchcodec_weights "
            "does not have: upgrade it, or install the package that brings this codec"
        )
    check_codec(header.codec)
    codec = get_codec(header.codec)
    codec.require(encoder=False)
    if header.across != 1 and not isinstance(codec, Codec):
        raise CodecError(f"tiles of codec {codec.name!r} are blocks: allowed: whole rows")
    return Matrix(header, codec, aliases, host)


_ARRAYS = (
    ("qdata", torch.uint8),
    ("scale", torch.uint8),
    ("zero_point", torch.float32),
    ("act_pre_scale", torch.uint8),
)


def check_arrays(*arrays: Tensor | None) -> None:
    """Reject arrays that are not what a weight is stored in, whatever they hold.

    An array that is expanded (stride 0) would take memory that was never stored.

    Args:
        arrays: qdata, scale, zero_point or None, act_pre_scale.

    Raises:
        CodecError: one is not of one dimension, contiguous, of its dtype, and where qdata is.
    """
    place: torch.device | None = None
    for (name, dtype), array in zip(_ARRAYS, arrays, strict=True):
        if array is None and name == "zero_point":
            continue
        if type(array) is not Tensor and type(array) is not torch.nn.Parameter:
            raise CodecError(f"{name} is {type(array).__name__}: allowed: torch.Tensor")
        if array.layout != torch.strided or array.dim() != 1 or array.dtype != dtype:
            raise CodecError(
                f"{name} is {array.layout}, {array.dtype} of shape {tuple(array.shape)}: allowed: "
                f"{dtype} of one dimension"
            )
        if not array.is_contiguous():
            raise CodecError(f"{name} has the stride {array.stride(0)}: allowed: 1")
        place = place or array.device
        if array.device != place:
            raise CodecError(f"{name} is on {array.device}, and qdata on {place}")


def capturing(device: torch.device) -> bool:
    """Whether the current stream of a device records a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def refuse_first_use(device: torch.device) -> None:
    """Reject what a weight's first use does on the host, in a CUDA graph.

    Raises:
        CodecError: one is captured on the device.
    """
    if capturing(device):
        raise CodecError(
            "a weight is used for the first time while a CUDA graph is captured, and is checked on "
            "the host: run the model once before"
        )


def verify_tiles(matrix: Matrix) -> Iterator[str]:
    """Check the checksum and the outliers of every tile that is there; nothing is decoded.

    Returns:
        What is wrong with each tile that is damaged.
    """
    data = matrix.stored().data
    for index in np.flatnonzero(matrix.header.tiles["payload_size"]).tolist():
        try:
            container.read_tile(data, matrix.header, index)
        except CodecError as error:
            yield str(error)


def decode_matrix(
    matrix: Matrix, window: Window, dtype: torch.dtype, threads: int | None = None
) -> Tensor:
    """Decode a part of a matrix, and of its tiles only those that hold it.

    Args:
        threads: how many to use, by default as many as PyTorch (`torch.get_num_threads`). Each
            needs memory for a tile.

    Returns:
        (window.rows, window.cols) of `dtype` on the CPU, contiguous.

    Raises:
        CodecError: a tile is corrupt.
    """
    rows, offset = decode_tile_rows(matrix, window, dtype, threads, _room)
    return cut(rows, offset, window)


def decode_tile_rows(
    matrix: Matrix,
    window: Window,
    dtype: torch.dtype,
    threads: int | None,
    room: Callable[[int, int, torch.dtype], Tensor],
) -> tuple[Tensor, int]:
    """Decode all tiles that hold a part of a matrix.

    Args:
        threads: as in `decode_matrix`.
        room: makes an uninitialized CPU tensor of so many rows and columns, and of a dtype.

    Returns:
        The rows of these tiles, what `room` made, and how many of them precede the window.

    Raises:
        CodecError: a tile is corrupt.
    """
    header = matrix.header
    check_window(matrix, window)
    tiles = matrix.tiles(window.first_row, window.first_row + window.rows)
    blocks = header.blocks
    first, end = blocks[tiles.start].first_row, blocks[tiles.stop - 1].end_row
    weight = room(end - first, header.cols, dtype)
    _decode_tiles(matrix, matrix.stored(), tiles, weight, threads or torch.get_num_threads())
    return weight, window.first_row - first


def cut(rows: Tensor, offset: int, window: Window) -> Tensor:
    """The window of rows of the matrix, `offset` of which precede it; contiguous."""
    part = rows[offset : offset + window.rows]
    return part[:, window.first_col : window.first_col + window.cols].contiguous()


_MAPPED = 2**20


def _room(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Memory for a weight.

    malloc keeps freed weights for the next, in pieces: up to three times the largest, measured as
    the peak of a model's forward pass. What is mapped goes back to the system at once.
    """
    size = rows * cols * dtype.itemsize
    with torch.inference_mode(False):  # the threads that fill it are not in the caller's mode
        if size < _MAPPED:
            return torch.empty(rows, cols, dtype=dtype)
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise CodecError(f"no memory for {rows}x{cols} weights of {dtype}: {error}") from None
        return torch.frombuffer(memory, dtype=dtype).view(rows, cols)


def decode_rows(matrix: Matrix, window: Window, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a part of a matrix, from the tiles that hold them.

    Args:
        indices: integers of any shape, on the CPU.

    Returns:
        (indices.numel(), window.cols) of `dtype` on the CPU.

    Raises:
        IndexError: an index lies outside of the window's rows.
        CodecError: a tile is corrupt.
    """
    flat = indices.reshape(-1).numpy()
    check_window(matrix, window)
    with torch.inference_mode(False):
        out = torch.empty(len(flat), window.cols, dtype=dtype)
    if not len(flat):
        return out
    if flat.min() < 0 or flat.max() >= window.rows:
        raise IndexError(
            f"indices from {flat.min()} to {flat.max()} into a weight of {window.rows} rows"
        )
    rows = flat.astype(np.int64) + window.first_row
    header = matrix.header
    grid = header.blocks
    holders = ((rows + 1) * grid.down - 1) // header.rows  # as TileGrid.band_of
    needed = np.unique(holders)
    bands = [grid[band * grid.across] for band in needed.tolist()]
    tiles = [matrix.tiles(band.first_row, band.end_row) for band in bands]
    stored = matrix.stored()
    columns = slice(window.first_col, window.first_col + window.cols)

    def decode(number: int) -> None:
        band = bands[number]
        decoded = torch.empty(band.rows, header.cols, dtype=dtype)
        _decode_tiles(matrix, stored, tiles[number], decoded, 1)
        wanted = np.flatnonzero(holders == needed[number])
        local = torch.from_numpy(rows[wanted] - band.first_row)
        out[torch.from_numpy(wanted)] = decoded[local, columns]

    for_each(decode, len(needed), torch.get_num_threads())
    return out


def check_window(matrix: Matrix, window: Window) -> None:
    """Reject a window of rows and columns that a matrix does not have.

    Raises:
        ValueError: names the window and the shape.
    """
    header = matrix.header
    first_row, rows, first_col, cols = window
    if not (
        0 <= first_row < first_row + rows <= header.rows
        and 0 <= first_col < first_col + cols <= header.cols
    ):
        raise ValueError(
            f"rows {first_row} to {first_row + rows} and columns {first_col} to {first_col + cols} "
            f"of a matrix of {header.rows}x{header.cols}"
        )


def _decode_tiles(
    matrix: Matrix, stored: StoredMatrix, tiles: range, out: Tensor, threads: int
) -> None:
    """Decode consecutive tiles into `out`, a contiguous CPU tensor of their rows."""
    if matrix.decodes_whole:
        dtype = str(out.dtype).removeprefix("torch.")
        matrix.codec.decode_tiles(stored, tiles, out.data_ptr(), dtype, threads)
        return
    blocks = matrix.header.blocks
    origin = blocks[tiles.start].first_row

    def decode(number: int) -> None:
        block = blocks[tiles[number]]
        rows = out[block.first_row - origin : block.end_row - origin]
        _decode_tile(matrix, stored, tiles[number], rows[:, block.first_col : block.end_col])

    for_each(decode, len(tiles), threads)


def _decode_tile(matrix: Matrix, stored: StoredMatrix, index: int, out: Tensor) -> None:
    """Decode one tile into `out`, a CPU tensor of the tile's shape."""
    header, codec = matrix.header, matrix.codec
    assert isinstance(codec, Codec)  # lossless ones decode whole
    block = header.blocks[index]
    payload, outliers = container.read_tile(stored.data, header, index)
    direct = out.dtype == torch.float32 and out.is_contiguous()
    tile = out if direct else torch.empty(out.shape, dtype=torch.float32)
    z = tile.numpy()
    unit = float(stored.units[index])
    codec.decode(payload, unit, header.private, (block.rows, block.cols), z)
    rows, cols = stored.row_scale, stored.col_scale
    denormalize(
        z,
        rows if len(rows) == 1 else rows[block.first_row : block.end_row],
        cols if len(cols) == 1 else cols[block.first_col : block.end_col],
    )
    if stored.zero_point is not None:
        z += stored.zero_point[block.first_row : block.end_row, None]
    if not direct:
        out.copy_(tile)
    if len(outliers.positions):
        values = torch.from_numpy(outliers.values.copy()).view(getattr(torch, header.dtype))
        places = np.divmod(outliers.positions, block.cols)
        out[torch.from_numpy(places[0]), torch.from_numpy(places[1])] = values.to(out.dtype)


def exact_weights(
    header: container.Header, outliers: Mapping[int, container.Outliers]
) -> tuple[NDArray[np.int64], Tensor]:
    """The weights of some tiles that are stored exactly.

    Args:
        outliers: by tile.

    Returns:
        Their places in the matrix, row-major, tile after tile; and their values in its dtype.
    """
    places, values = [np.empty(0, np.int64)], [np.empty(0, np.uint8)]
    for index, stored in outliers.items():
        block = header.blocks[index]
        row, col = np.divmod(stored.positions, block.cols)
        places.append((row + block.first_row) * header.cols + col + block.first_col)
        values.append(stored.values)
    dtype = getattr(torch, header.dtype)
    # In two dimensions, as an empty tensor of one has no view in another dtype.
    contents = torch.from_numpy(np.concatenate(values).reshape(-1, dtype.itemsize))
    return np.concatenate(places), contents.view(dtype)[:, 0]


FUSED_TOKENS = 16
"""Up to so many tokens are multiplied as the weight is decoded, more by a matrix product."""

_TILES_PER_THREAD = 4


def multiply_matrix(matrix: Matrix, window: Window, x: Tensor) -> Tensor:
    """x @ W.T without ever storing W, for those that can (`Matrix.decodes_whole`).

    Args:
        window: which part of the matrix W is.
        x: (tokens, window.cols), float32, float16 or bfloat16.

    Returns:
        (tokens, window.rows) of x's dtype, on the CPU.

    Raises:
        CodecError: a tile is corrupt.
    """
    check_window(matrix, window)
    if window.cols < matrix.header.cols:
        rest = matrix.header.cols - window.first_col - window.cols
        x = torch.nn.functional.pad(x, (window.first_col, rest))
    first, end = window.first_row, window.first_row + window.rows
    tiles = matrix.tiles(first, end)
    stored, codec = matrix.stored(), matrix.codec
    if len(x) > FUSED_TOKENS or not isinstance(codec, Codec):
        return _multiply_groups(matrix, stored, tiles, first, end, x)
    wide = x.detach().float()
    product = np.empty((len(x), stored.rows), np.float32)
    scaled = np.ascontiguousarray(wide.numpy() * stored.col_scale)
    codec.multiply_tiles(stored, tiles, scaled, product, torch.get_num_threads())
    result = torch.from_numpy(product[:, first:end])
    if stored.zero_point is not None:
        zero_points = torch.from_numpy(stored.zero_point[first:end])
        result += wide.sum(1, keepdim=True) * zero_points
    return result.to(x.dtype).contiguous()


def _multiply_groups(
    matrix: Matrix, stored: StoredMatrix, tiles: range, first_row: int, end_row: int, x: Tensor
) -> Tensor:
    """Decode a few tiles at a time into one buffer, and multiply by that."""
    blocks = matrix.header.blocks
    threads = torch.get_num_threads()
    step = _TILES_PER_THREAD * threads
    groups = [tiles[i : i + step] for i in range(0, len(tiles), step)]
    rows = [(blocks[group.start].first_row, blocks[group.stop - 1].end_row) for group in groups]
    with torch.inference_mode(False):  # as in decode_matrix
        buffer = torch.empty(max(b - a for a, b in rows), stored.cols, dtype=x.dtype)
    product = x.new_empty(len(x), end_row - first_row)
    for group, (start, stop) in zip(groups, rows, strict=True):
        _decode_tiles(matrix, stored, group, buffer[: stop - start], threads)
        a, b = max(start, first_row), min(stop, end_row)
        product[:, a - first_row : b - first_row] = x @ buffer[a - start : b - start].T
    return product


def for_each(function: Callable[[int], None], times: int, threads: int) -> None:
    """Call a function with 0 … times − 1 on some threads."""
    threads = min(threads, times)
    if threads == 1:
        for index in range(times):
            function(index)
    else:
        # One queue entry per tile: tiles differ in time, so threads take the next as they finish.
        for _ in _pool(threads).map(function, range(times)):
            pass


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="torchcodec_weights-decode")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def as_array(tensor: Tensor) -> NDArray[Any]:
    """The same memory as an array, where the tensor is on the CPU."""
    host = tensor.detach().cpu().contiguous()
    _check_memory(host)
    # Tensor.numpy() would forbid FSDP to release it.
    return np.from_dlpack(host)


def bytes_of(tensor: Tensor, count: int | None = None) -> bytes:
    """A copy of a contiguous CPU tensor's bytes, or of the first `count` of as many or more.

    Of a few bytes it is faster than `as_array`.
    """
    _check_memory(tensor)
    count = tensor.nbytes if count is None else count
    return ctypes.string_at(tensor.data_ptr(), count) if count else b""


def _check_memory(tensor: Tensor) -> None:
    if tensor.untyped_storage().nbytes() < tensor.nbytes:
        raise CodecError("the memory of a bitstream was released, by FSDP for one")
