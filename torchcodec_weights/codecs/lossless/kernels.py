"""The compiled part of the lossless codec, through its C interface (native/)."""

import ctypes
from ctypes import POINTER, byref, c_double, c_int, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.common import compiled
from torchcodec_weights.codecs.common.compiled import MatrixView, best_level
from torchcodec_weights.codecs.records import BitArray
from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.dtypes import DTYPE_CODES

SYMBOLS = 256
_TABLE_BOUND = 1 + 2 * SYMBOLS


@cache
def _library() -> ctypes.CDLL:
    lib = compiled.require("lossless")
    u8, u32, u64 = POINTER(c_uint8), POINTER(c_uint32), POINTER(c_uint64)
    size, text = c_size_t, ctypes.c_char_p
    lib.lossless_count.argtypes = [c_int, c_void_p, size, u64]
    lib.lossless_count.restype = None
    lib.lossless_table.argtypes = [u64, u8, POINTER(c_double)]
    lib.lossless_table.restype = size
    lib.lossless_bound.argtypes = [size]
    lib.lossless_bound.restype = size
    lib.lossless_encode.argtypes = [
        c_int, text, size, c_void_p, size, u8, u32, POINTER(size),
    ]  # fmt: skip
    lib.lossless_encode.restype = size
    lib.lossless_decode.argtypes = [c_int, c_int, text, size, text, size, size, c_void_p]
    lib.lossless_decode_matrix.argtypes = [
        c_int, text, size, POINTER(MatrixView), c_int, c_void_p, c_int, POINTER(size),
    ]  # fmt: skip
    return lib


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(POINTER(kind))


def count(tile: BitArray, dtype: str, counts: NDArray[np.uint64]) -> None:
    """Add to the counts of magnitudes by their highest bits.

    Args:
        tile: C-contiguous, the bits of weights of `dtype`.
        counts: uint64, by the highest 11 bits, of float16 by the highest 8.
    """
    target = _pointer(counts, c_uint64)
    _library().lossless_count(DTYPE_CODES[dtype], tile.ctypes.data, tile.size, target)


def table(counts: NDArray[np.uint64]) -> tuple[bytes, float]:
    """The table for symbols that occur so often, as stored, and the bits that they take with it.

    Args:
        counts: uint64 (256,), not all 0.
    """
    stored = np.empty(_TABLE_BOUND, np.uint8)
    bits = c_double()
    counts = np.ascontiguousarray(counts)
    size = _library().lossless_table(
        _pointer(counts, c_uint64), _pointer(stored, c_uint8), byref(bits)
    )
    return stored[:size].tobytes(), bits.value


def encode(tile: BitArray, dtype: str, private: bytes) -> tuple[bytes, NDArray[np.int64]]:
    """Payload of a tile, and the positions of weights that have no symbol.

    Args:
        tile: C-contiguous, the bits of weights of `dtype`.
    """
    payload = np.empty(_library().lossless_bound(tile.size), np.uint8)
    outliers = np.empty(tile.size, np.uint32)
    found = c_size_t()
    size = _library().lossless_encode(
        DTYPE_CODES[dtype], private, len(private), tile.ctypes.data, tile.size,
        _pointer(payload, c_uint8), _pointer(outliers, c_uint32), byref(found),
    )  # fmt: skip
    if not size:
        raise CodecError("lossless: private data is malformed")
    return payload[:size].tobytes(), outliers[: found.value].astype(np.int64)


def decode(
    payload: bytes, dtype: str, private: bytes, out: BitArray, level: int | None = None
) -> None:
    """Decode one payload, but for its outliers.

    Args:
        out: C-contiguous, gets the bits of weights of `dtype`.
        level: index into `compiled.LEVELS`, by default the best.

    Raises:
        CodecError: payload or private data do not fit.
    """
    status = _library().lossless_decode(
        best_level() if level is None else level, DTYPE_CODES[dtype], private, len(private),
        payload, len(payload), out.size, out.ctypes.data,
    )  # fmt: skip
    compiled.check("lossless", status)


def decode_matrix(private: bytes, matrix: MatrixView, out: int, dtype: str, threads: int) -> None:
    """Decode the rows of some tiles, checksums and outliers included.

    Args:
        out: address of as many values of `dtype`, one of `DTYPE_CODES`.
        threads: how many to use.

    Raises:
        CodecError: a tile is corrupt.
    """
    failed = c_size_t()
    status = _library().lossless_decode_matrix(
        best_level(), private, len(private), byref(matrix), DTYPE_CODES[dtype], out, threads,
        byref(failed),
    )  # fmt: skip
    compiled.check("lossless", status, failed.value)
