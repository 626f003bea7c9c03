"""The CPU's decoder, for every matrix: tiles in parallel, then the inverse of the normalization."""

import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchcodec_weights.codecs.base import Codec
from torchcodec_weights.codecs.records import StoredMatrix
from torchcodec_weights.decoders.transfer import pinned, upload
from torchcodec_weights.errors import CodecError
from torchcodec_weights.format import container
from torchcodec_weights.format.dtypes import DTYPE_CODES, dtype_name
from torchcodec_weights.format.order import restore_order
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.normalize import denormalize
from torchcodec_weights.matrix.opened import OpenedMatrix


def decode_for(
    matrix: OpenedMatrix,
    window: Window,
    dtype: torch.dtype,
    device: torch.device,
    threads: int | None = None,
) -> Tensor:
    """Decode a window of a matrix; for a CUDA device to pinned memory, which is uploaded.

    Args:
        threads: as in `decode_matrix`.

    Returns:
        (window.rows, window.cols) of `dtype` on `device`, contiguous. The current stream may use it
        at once.

    Raises:
        CodecError: a tile is corrupt.
    """
    if device.type != "cuda":
        return decode_matrix(matrix, window, dtype, threads).to(device)
    rows, offset = decode_tile_rows(matrix, window, dtype, threads, pinned)
    return cut(upload(rows, device), offset, window)


def rows_for(matrix: OpenedMatrix, window: Window, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a window of a matrix, on the device of the indices, for which the host waits.

    Returns:
        (indices.numel(), window.cols) of `dtype`.

    Raises:
        IndexError: an index is outside the window's rows.
        CodecError: a tile is corrupt.
    """
    rows = decode_rows(matrix, window, indices.cpu(), dtype)
    if indices.device.type != "cuda":
        return rows.to(indices.device)
    return upload(rows.pin_memory(), indices.device)


def decode_matrix(
    matrix: OpenedMatrix, window: Window, dtype: torch.dtype, threads: int | None = None
) -> Tensor:
    """Decode a window of a matrix; only the tiles that overlap it are decoded.

    Args:
        threads: how many to use, by default as many as PyTorch (`torch.get_num_threads`). Each
            needs memory for a tile.

    Returns:
        (window.rows, window.cols) of `dtype` on the CPU, contiguous.

    Raises:
        CodecError: a tile is corrupt.
    """
    rows, offset = decode_tile_rows(matrix, window, dtype, threads, _mapped)
    return cut(rows, offset, window)


def decode_tile_rows(
    matrix: OpenedMatrix,
    window: Window,
    dtype: torch.dtype,
    threads: int | None,
    allocate: Callable[[int, int, torch.dtype], Tensor],
) -> tuple[Tensor, int]:
    """Decode all tiles that overlap a window of a matrix.

    Args:
        threads: as in `decode_matrix`.
        allocate: returns an uninitialized CPU tensor (rows, columns) of a dtype.

    Returns:
        The rows of these tiles, from `allocate`, and how many of them precede the window.

    Raises:
        CodecError: a tile is corrupt.
    """
    header = matrix.header
    container.check_window(matrix.header, window)
    tiles = matrix.tiles(window.first_row, window.first_row + window.rows)
    blocks = header.blocks
    first, end = blocks[tiles.start].first_row, blocks[tiles.stop - 1].end_row
    weight = allocate(end - first, header.cols, dtype)
    _decode_tiles(matrix, matrix.stored(), tiles, weight, threads or torch.get_num_threads())
    return weight, window.first_row - first


def cut(rows: Tensor, offset: int, window: Window) -> Tensor:
    """A contiguous copy of a window, from rows of which `offset` precede the window."""
    wanted = rows[offset : offset + window.rows]
    return wanted[:, window.first_col : window.first_col + window.cols].contiguous()


_MAPPED = 2**20


def _mapped(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Memory for a weight, mapped directly if it is large.

    malloc keeps freed memory in fragments for later allocations: up to three times the largest
    weight, measured as the peak of a model's forward pass. Mapped memory is returned to the system
    as soon as it is freed.
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


def decode_rows(
    matrix: OpenedMatrix, window: Window, indices: Tensor, dtype: torch.dtype
) -> Tensor:
    """Rows of a window of a matrix; only the tiles that hold them are decoded.

    Args:
        indices: integers of any shape, on the CPU.

    Returns:
        (indices.numel(), window.cols) of `dtype` on the CPU.

    Raises:
        IndexError: an index is outside the window's rows.
        CodecError: a tile is corrupt.
    """
    flat = indices.reshape(-1).numpy()
    container.check_window(matrix.header, window)
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
    words = _words(out)

    def decode(number: int) -> None:
        band = bands[number]
        decoded = torch.empty(band.rows, header.cols, dtype=dtype)
        _decode_tiles(matrix, stored, tiles[number], decoded, 1)
        wanted = np.flatnonzero(holders == needed[number])
        words[wanted] = _words(decoded)[rows[wanted] - band.first_row, columns]

    for_each(decode, len(needed), torch.get_num_threads())
    return out


def _words(weights: Tensor) -> NDArray[Any]:
    """The memory of a tensor as integers, to be copied in one thread, as `for_each` needs it."""
    return weights.view(torch.int32 if weights.element_size() == 4 else torch.int16).numpy()


def _decode_tiles(
    matrix: OpenedMatrix, stored: StoredMatrix, tiles: range, out: Tensor, threads: int
) -> None:
    """Decode consecutive tiles into `out`, a contiguous CPU tensor of their rows."""
    if matrix.decodes_whole:
        dtype = dtype_name(out.dtype)
        matrix.codec.decode_tiles(stored, tiles, out.data_ptr(), dtype, threads)
        return
    blocks = matrix.header.blocks
    origin = blocks[tiles.start].first_row

    def decode(number: int) -> None:
        block = blocks[tiles[number]]
        rows = out[block.first_row - origin : block.end_row - origin]
        _decode_tile(matrix, stored, tiles[number], rows[:, block.first_col : block.end_col])

    for_each(decode, len(tiles), threads)


def _decode_tile(matrix: OpenedMatrix, stored: StoredMatrix, index: int, out: Tensor) -> None:
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
    restore_order(z, matrix.row_order(block.first_row, block.end_row), stored.column_order)
    rows, cols = stored.row_scale, stored.col_scale
    denormalize(
        z,
        rows if len(rows) == 1 else rows[block.first_row : block.end_row],
        cols if len(cols) == 1 else cols[block.first_col : block.end_col],
    )
    if stored.zero_point is not None:
        z += stored.zero_point[block.first_row : block.end_row, None]
    if not direct:
        _copy(tile, out)
    if len(outliers.positions):
        values = torch.from_numpy(outliers.values.copy()).view(getattr(torch, header.dtype))
        places = np.divmod(outliers.positions, block.cols)
        out[torch.from_numpy(places[0]), torch.from_numpy(places[1])] = values.to(out.dtype)


_SERIAL = 2**14  # elements that PyTorch copies in the calling thread


def _copy(tile: Tensor, out: Tensor) -> None:
    """Copy a matrix to one of another dtype, in this thread, as `for_each` needs it."""
    for columns, to in zip(tile.split(_SERIAL, 1), out.split(_SERIAL, 1), strict=True):
        rows = max(1, _SERIAL // columns.shape[1])
        for part, there in zip(columns.split(rows), to.split(rows), strict=True):
            there.copy_(part)


FUSED_TOKENS = 16
"""Most tokens that are multiplied tile by tile as the weight is decoded; for more, decoded tiles go
through a matrix product."""

_TILES_PER_THREAD = 4

_CODES = {getattr(torch, name): code for name, code in DTYPE_CODES.items()}


def multiply_matrix(
    matrix: OpenedMatrix, window: Window, x: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x @ W.T + bias without storing W, for matrices with `OpenedMatrix.decodes_whole`.

    Args:
        window: the rows and columns of the matrix that W consists of.
        x: (tokens, window.cols), float32, float16 or bfloat16.
        bias: (window.rows,) of x's dtype, or None.

    Returns:
        (tokens, window.rows) of x's dtype, on the CPU.

    Raises:
        CodecError: a tile is corrupt.
    """
    tokens = x.shape[0]
    if not 0 < tokens <= FUSED_TOKENS or not isinstance(matrix.codec, Codec):
        with torch.no_grad():
            return _multiply_groups(matrix, window, x, bias)
    product, dtype = matrix.product(window), x.dtype
    x = x.contiguous()
    y = torch.empty(tokens, window.rows, dtype=dtype)
    if bias is not None:
        bias = bias.contiguous()
    product(
        x.data_ptr(),
        _CODES[dtype],
        tokens,
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def _multiply_groups(
    matrix: OpenedMatrix, window: Window, x: Tensor, bias: Tensor | None
) -> Tensor:
    """As `multiply_matrix`; decodes a few tiles at a time to one buffer, and multiplies by that."""
    container.check_window(matrix.header, window)
    if window.cols < matrix.header.cols:
        rest = matrix.header.cols - window.first_col - window.cols
        x = torch.nn.functional.pad(x, (window.first_col, rest))
    first_row, end_row = window.first_row, window.first_row + window.rows
    tiles, stored = matrix.tiles(first_row, end_row), matrix.stored()
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
    return product if bias is None else product.add_(bias)


def for_each(function: Callable[[int], None], times: int, threads: int) -> None:
    """Call a function with 0 … times − 1 on some threads.

    It must not call operators of PyTorch on many elements. Those are divided among threads of
    OpenMP, of which each thread here would start its own. With more of them than processors
    OpenMP's threads sleep while they wait, for as long as the process lives, and all products take
    a quarter longer.
    """
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
