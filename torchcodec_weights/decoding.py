"""Container to dense weight: check, decode tiles in parallel, undo the normalization."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchcodec_weights import container
from torchcodec_weights.codecs.base import (
    BaseCodec,
    Codec,
    CodecError,
    FloatArray,
    StoredMatrix,
)
from torchcodec_weights.codecs.registry import codec_names, get_codec
from torchcodec_weights.normalize import decode_scale, denormalize


@dataclass(frozen=True)
class Matrix:
    """An encoded matrix with its header read and checked, ready to decode."""

    header: container.Header
    codec: BaseCodec
    stored: StoredMatrix


def open_matrix(
    qdata: Tensor, scale: Tensor, zero_point: Tensor | None, act_pre_scale: Tensor
) -> Matrix:
    """Read and check all but the tiles.

    Args:
        qdata: uint8 (bytes,), the container.
        scale: uint8 (rows,) or (1,), scale codes.
        zero_point: float32 (rows,) or None.
        act_pre_scale: uint8 (cols,) or (1,), scale codes.

    Raises:
        CodecError: corrupt, from a newer format, or for a codec that is not here.
    """
    data = _array(qdata).data
    header = container.parse_header(data)
    rows, cols = _array(scale), _array(act_pre_scale)
    offsets = None if zero_point is None else _array(zero_point)
    if vectors_crc(rows, offsets, cols) != header.vectors_crc:
        raise CodecError("scale, zero_point or act_pre_scale is corrupt or of another matrix")
    if len(rows) not in (1, header.rows) or len(cols) not in (1, header.cols):
        raise CodecError(
            f"{len(rows)} row and {len(cols)} column scales do not fit a matrix of "
            f"{header.rows}x{header.cols}"
        )
    if header.codec not in codec_names():
        raise CodecError(
            f"encoded with the codec {header.codec!r}, which this version of torchcodec_weights "
            "does not have: upgrade it, or install the package that brings this codec"
        )
    codec = get_codec(header.codec)
    codec.require(encoder=False)
    return Matrix(
        header,
        codec,
        StoredMatrix(
            data=data,
            offsets=header.offsets,
            payload_sizes=np.ascontiguousarray(header.tiles["payload_size"]),
            outlier_sizes=np.ascontiguousarray(header.tiles["outliers_size"]),
            crcs=np.ascontiguousarray(header.tiles["crc"]),
            units=np.ascontiguousarray(header.tiles["unit"]),
            rows=header.rows,
            cols=header.cols,
            row_scale=decode_scale(rows, header.row_base),
            col_scale=decode_scale(cols, header.col_base),
            zero_point=offsets,
            dtype=header.dtype,
            private=header.private,
        ),
    )


def vectors_crc(
    scale: NDArray[np.uint8], zero_point: FloatArray | None, act_pre_scale: NDArray[np.uint8]
) -> int:
    """CRC-32C over the vectors stored beside the container, as the header holds it."""
    offsets = b"" if zero_point is None else zero_point.tobytes()
    return container.crc32c(scale.tobytes(), offsets, act_pre_scale.tobytes())


def decode_matrix(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """Decode all tiles.

    Uses as many threads as PyTorch (`torch.get_num_threads`), and beyond the result no more
    memory than a tile for each.

    Returns:
        (rows, cols) of `dtype` on the CPU.

    Raises:
        CodecError: a tile is corrupt.
    """
    header = matrix.header
    with torch.inference_mode(False):  # the threads that fill it are not in the caller's mode
        weight = torch.empty(header.rows, header.cols, dtype=dtype)
    if matrix.codec.decodes_whole:
        _decode_tiles(matrix, range(len(header.tiles)), weight)
        return weight
    bounds = header.bounds

    def decode(index: int) -> None:
        first, end = bounds[index]
        _decode_tile(matrix, index, weight[first:end])

    for_each(decode, len(bounds))
    return weight


def _decode_tile(matrix: Matrix, index: int, out: Tensor) -> None:
    """Decode one tile into `out`, a contiguous CPU tensor of the tile's shape."""
    header, stored, codec = matrix.header, matrix.stored, matrix.codec
    assert isinstance(codec, Codec)  # lossless ones decode whole
    first, end = header.bounds[index]
    payload, outliers = container.read_tile(stored.data, header, index)
    direct = out.dtype == torch.float32
    tile = out if direct else torch.empty(out.shape, dtype=torch.float32)
    z = tile.numpy()
    unit = float(stored.units[index])
    codec.decode(payload, unit, header.private, (end - first, header.cols), z)
    rows = stored.row_scale if len(stored.row_scale) == 1 else stored.row_scale[first:end]
    denormalize(z, rows, stored.col_scale)
    if stored.zero_point is not None:
        z += stored.zero_point[first:end, None]
    if not direct:
        out.copy_(tile)
    if len(outliers.positions):
        values = torch.from_numpy(outliers.values.copy()).view(getattr(torch, header.dtype))
        out.view(-1)[torch.from_numpy(outliers.positions)] = values.to(out.dtype)


def _decode_tiles(matrix: Matrix, tiles: range, out: Tensor) -> None:
    """Decode consecutive tiles of a codec that `decodes_whole` into the first rows of `out`."""
    dtype = str(out.dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    matrix.codec.decode_tiles(matrix.stored, tiles, out.data_ptr(), dtype, threads)


FUSED_TOKENS = 16
"""Up to so many tokens are multiplied as the weight is decoded, more by a matrix product."""

_TILES_PER_THREAD = 4


def multiply_matrix(matrix: Matrix, x: Tensor) -> Tensor:
    """x @ W.T without ever storing W, for codecs that can (`BaseCodec.decodes_whole`).

    Args:
        x: (tokens, cols), float32, float16 or bfloat16.

    Returns:
        (tokens, rows) of x's dtype, on the CPU.

    Raises:
        CodecError: a tile is corrupt.
    """
    stored, codec = matrix.stored, matrix.codec
    if len(x) > FUSED_TOKENS or not isinstance(codec, Codec):
        return _multiply_groups(matrix, x)
    wide = x.detach().float()
    product = np.empty((len(x), stored.rows), np.float32)
    scaled = np.ascontiguousarray(wide.numpy() * stored.col_scale)
    codec.multiply_whole(stored, scaled, product, torch.get_num_threads())
    result = torch.from_numpy(product)
    if stored.zero_point is not None:
        result += wide.sum(1, keepdim=True) * torch.from_numpy(stored.zero_point)
    return result.to(x.dtype)


def _multiply_groups(matrix: Matrix, x: Tensor) -> Tensor:
    """Decode a few tiles at a time into one buffer, and multiply by that."""
    bounds = matrix.header.bounds
    step = _TILES_PER_THREAD * torch.get_num_threads()
    groups = [range(i, min(i + step, len(bounds))) for i in range(0, len(bounds), step)]
    rows = [(bounds[group.start][0], bounds[group.stop - 1][1]) for group in groups]
    with torch.inference_mode(False):  # as in decode_matrix
        buffer = torch.empty(max(b - a for a, b in rows), matrix.stored.cols, dtype=x.dtype)
    product = x.new_empty(len(x), matrix.stored.rows)
    for group, (first, end) in zip(groups, rows, strict=True):
        weight = buffer[: end - first]
        _decode_tiles(matrix, group, weight)
        product[:, first:end] = x @ weight.T
    return product


def for_each(function: Callable[[int], None], count: int) -> None:
    """Call a function with 0 … count − 1 on PyTorch's number of threads."""
    threads = min(torch.get_num_threads(), count)
    if threads == 1:
        for index in range(count):
            function(index)
    else:
        # One queue entry per tile: tiles differ in time, so threads take the next as they finish.
        for _ in _pool(threads).map(function, range(count)):
            pass


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="torchcodec_weights-decode")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().contiguous().numpy()
