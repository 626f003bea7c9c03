"""The compiled part of ECTCQ, through its C interface (native/api.cpp, native/matrix.cpp)."""

import ctypes
from ctypes import POINTER, byref, c_bool, c_float, c_int, c_int32, c_size_t, c_uint8, c_uint32
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.common import compiled
from torchcodec_weights.codecs.common.compiled import MatrixView, best_level
from torchcodec_weights.codecs.records import FloatArray
from torchcodec_weights.format.dtypes import DTYPE_CODES

LANES = 32
SYMBOLS = 256
SLOTS = 4096


class Tables(ctypes.Structure):
    """The decoder's tables of an entropy model: Tables of codecs/common/native/layout.h."""

    _fields_ = (
        ("slots", c_uint32 * (2 * SLOTS)),
        ("values", c_float * (2 * SYMBOLS)),
        ("feedback", c_uint32),
        ("input", c_uint32),
        ("unit", c_float),
    )


class Model(ctypes.Structure):
    """The trellis search's tables of an entropy model: Model of codecs/common/native/layout.h."""

    _fields_ = (
        ("frequency", c_uint32 * (2 * SYMBOLS)),
        ("start", c_uint32 * (2 * SYMBOLS)),
        ("line", c_float * (2 * SYMBOLS * 2)),
        ("best", ctypes.c_void_p),
        ("cells", c_int32),
        ("first_cell", c_float),
        ("cells_per_unit", c_float),
        ("states", c_int32),
    )


@cache
def _library() -> ctypes.CDLL:
    lib = compiled.require("ectcq", Tables, Model)
    u8, f32, u16 = POINTER(c_uint8), POINTER(c_float), POINTER(ctypes.c_uint16)
    size = c_size_t
    lib.ectcq_trellis.argtypes = [size, POINTER(c_uint32), POINTER(c_uint32)]
    lib.ectcq_trellis.restype = c_int32
    lib.ectcq_decode.argtypes = [c_int, POINTER(Tables), ctypes.c_char_p, size, size, f32]
    failed = POINTER(c_size_t)
    lib.ectcq_decode_matrix.argtypes = [
        c_int, POINTER(Tables), POINTER(MatrixView), c_int, ctypes.c_void_p, c_int, failed,
    ]  # fmt: skip
    lib.ectcq_multiply_matrix.argtypes = [
        c_int, POINTER(Tables), POINTER(MatrixView), f32, size, f32, c_int, failed,
    ]  # fmt: skip
    lib.ectcq_search.argtypes = [c_int, POINTER(Model), f32, size, u16]
    lib.ectcq_search.restype = c_bool
    lib.ectcq_bound.argtypes = [size]
    lib.ectcq_bound.restype = size
    lib.ectcq_encode.argtypes = [c_int, POINTER(Model), f32, size, u8]
    lib.ectcq_encode.restype = size
    return lib


@cache
def trellises() -> dict[int, tuple[int, int]]:
    """Number of states to parity-check polynomials (h0, h1): the table of native/trellis.h.

    Raises:
        CodecUnavailableError: the library was not built, or is of another version.
    """
    found: dict[int, tuple[int, int]] = {}
    h0, h1 = c_uint32(), c_uint32()
    while states := _library().ectcq_trellis(len(found), byref(h0), byref(h1)):
        found[states] = h0.value, h1.value
    return found


def _floats(array: FloatArray) -> Any:
    return array.ctypes.data_as(POINTER(c_float))


def decode(tables: Tables, payload: bytes, out: FloatArray, level: int | None = None) -> None:
    """Decode one payload into `out`, float32, C-contiguous, not scaled.

    Args:
        level: index into `LEVELS`, by default the best.

    Raises:
        CodecError: the payload does not fit.
    """
    chosen = best_level() if level is None else level
    status = _library().ectcq_decode(
        chosen, byref(tables), payload, len(payload), out.size, _floats(out)
    )
    compiled.check("ectcq", status)


def decode_matrix(
    tables: Tables,
    matrix: MatrixView,
    out: int,
    dtype: str,
    threads: int,
    level: int | None = None,
) -> None:
    """Decode the rows of some tiles, checksums, scales and outliers included.

    Args:
        out: address of as many values of `dtype`, one of `DTYPE_CODES`.
        threads: how many to use.
        level: index into `LEVELS`, by default the best.

    Raises:
        CodecError: a tile is corrupt.
    """
    chosen = best_level() if level is None else level
    failed = c_size_t()
    # fmt: off
    status = _library().ectcq_decode_matrix(
        chosen, byref(tables), byref(matrix), DTYPE_CODES[dtype], out, threads, byref(failed)
    )
    # fmt: on
    compiled.check("ectcq", status, failed.value)


def multiply_matrix(
    tables: Tables,
    matrix: MatrixView,
    scaled: FloatArray,
    product: FloatArray,
    threads: int,
    level: int | None = None,
) -> None:
    """Decode tile by tile and multiply; see matrix.cpp.

    Args:
        scaled: float32 (tokens, cols), C-contiguous, columns multiplied by their scales.
        product: float32 (tokens, rows), C-contiguous; the tiles' rows are written.
        threads: how many to use.
        level: index into `LEVELS`, by default the best.

    Raises:
        CodecError: a tile is corrupt.
    """
    chosen = best_level() if level is None else level
    failed = c_size_t()
    # fmt: off
    status = _library().ectcq_multiply_matrix(
        chosen, byref(tables), byref(matrix), _floats(scaled), len(scaled), _floats(product),
        threads, byref(failed),
    )
    # fmt: on
    compiled.check("ectcq", status, failed.value)


def search(model: Model, z: FloatArray, level: int | None = None) -> NDArray[np.uint16]:
    """Paths of the 32 lanes of a stream.

    Args:
        z: float32 (n,), n a multiple of 32.

    Returns:
        uint16 (n,): symbol | union quantizer << 8.

    Raises:
        ValueError: there is no trellis of the model's number of states.
    """
    path = np.empty(len(z), np.uint16)
    target = path.ctypes.data_as(POINTER(ctypes.c_uint16))
    chosen = best_level() if level is None else level
    if not _library().ectcq_search(chosen, byref(model), _floats(z), len(z), target):
        raise _no_trellis(model)
    return path


def encode(model: Model, tile: FloatArray, level: int | None = None) -> bytes:
    """Payload of a tile, float32 (rows, cols).

    Raises:
        ValueError: there is no trellis of the model's number of states.
    """
    tile = np.ascontiguousarray(tile)
    payload = np.empty(_library().ectcq_bound(tile.size), np.uint8)
    target = payload.ctypes.data_as(POINTER(c_uint8))
    chosen = best_level() if level is None else level
    size = _library().ectcq_encode(chosen, byref(model), _floats(tile), tile.size, target)
    if not size:
        raise _no_trellis(model)
    return payload[:size].tobytes()


def _no_trellis(model: Model) -> ValueError:
    return ValueError(f"model.states={model.states}: allowed: {', '.join(map(str, trellises()))}")
