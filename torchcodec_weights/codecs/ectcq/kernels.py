"""The compiled part of ECTCQ, through its C interface (native/api.cpp).

`ctypes` lets go of the GIL during a call, so tiles are coded in parallel threads.
"""

import ctypes
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint8, c_uint32
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.base import CodecError, CodecUnavailableError, FloatArray

LANES = 32
SYMBOLS = 256
SLOTS = 4096
MISSING = (
    "its compiled part was not built: install a wheel of torchcodec-weights, or a C++ compiler "
    "(Debian: apt install g++) and then torchcodec-weights from source"
)

LEVELS = ("scalar", "avx2", "avx512")
_ERRORS = {
    1: "stream ends before its weights do",
    2: "stream has bytes left over",
    3: "stream has a tail longer than itself",
}


class Tables(ctypes.Structure):
    """What decoding needs of an entropy model; see ectcq.h."""

    _fields_ = (
        ("slots", c_uint32 * (2 * SLOTS)),
        ("values", c_float * (2 * SYMBOLS)),
        ("feedback", c_uint32),
        ("input", c_uint32),
    )


class Model(ctypes.Structure):
    """What the trellis search needs of an entropy model; see encode.h."""

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
def library() -> ctypes.CDLL | None:
    """The compiled part, or None where it was not built."""
    path = Path(__file__).parent / "libectcq.so"
    try:
        lib = ctypes.CDLL(str(path))
    except OSError:
        return None
    u8, f32, u16 = POINTER(c_uint8), POINTER(c_float), POINTER(ctypes.c_uint16)
    size = c_size_t
    lib.ectcq_best_level.restype = c_int
    lib.ectcq_decode.argtypes = [
        c_int, POINTER(Tables), ctypes.c_char_p, size, size, size, f32, size, f32, size, f32,
    ]  # fmt: skip
    lib.ectcq_multiply.argtypes = [
        c_int, POINTER(Tables), ctypes.c_char_p, size, size, size, POINTER(c_int64), f32, size,
        f32, size, f32, size, f32, f32, size,
    ]  # fmt: skip
    lib.ectcq_search.argtypes = [c_int, POINTER(Model), f32, size, u16]
    lib.ectcq_search.restype = None
    lib.ectcq_bound.argtypes = [size]
    lib.ectcq_bound.restype = size
    lib.ectcq_encode.argtypes = [c_int, POINTER(Model), f32, size, u8]
    lib.ectcq_encode.restype = size
    return lib


def _library() -> ctypes.CDLL:
    lib = library()
    if lib is None:
        raise CodecUnavailableError(f"codec 'ectcq': {MISSING}")
    return lib


@cache
def best_level() -> int:
    """The best instruction set of this processor, an index into `LEVELS`."""
    return int(_library().ectcq_best_level())


def _floats(array: FloatArray) -> Any:
    return array.ctypes.data_as(POINTER(c_float))


def decode(
    tables: Tables,
    payload: bytes,
    row_scale: FloatArray,
    col_scale: FloatArray,
    out: FloatArray,
    level: int | None = None,
) -> None:
    """Decode a tile into `out`, float32 (rows, cols), C-contiguous, and scale it.

    Args:
        row_scale: float32 (rows,) or (1,).
        col_scale: float32 (cols,) or (1,).
        level: index into `LEVELS`, by default the best.

    Raises:
        CodecError: the payload does not fit the tile.
    """
    rows, cols = out.shape
    # fmt: off
    status = _library().ectcq_decode(
        best_level() if level is None else level, byref(tables), payload, len(payload), rows, cols,
        _floats(row_scale), int(len(row_scale) > 1), _floats(col_scale), int(len(col_scale) > 1),
        _floats(out),
    )
    # fmt: on
    _check(status)


def multiply(
    tables: Tables,
    payload: bytes,
    positions: NDArray[np.int64],
    values: FloatArray,
    row_scale: FloatArray,
    x: FloatArray,
    y: FloatArray,
    level: int | None = None,
) -> None:
    """Decode a tile and multiply.

    Args:
        positions: int64 (n,), row-major, increasing: outliers of the tile.
        values: float32 (n,), what stands there instead, before `row_scale`.
        row_scale: float32 (rows,) or (1,).
        x: float32 (tokens, cols), C-contiguous.
        y: float32 (tokens, rows), its last dimension dense: written.
        level: index into `LEVELS`, by default the best.

    Raises:
        CodecError: the payload does not fit the tile.
    """
    buffer = np.empty(y.shape[1] * x.shape[1], np.float32)
    # fmt: off
    status = _library().ectcq_multiply(
        best_level() if level is None else level, byref(tables), payload, len(payload),
        y.shape[1], x.shape[1], positions.ctypes.data_as(POINTER(c_int64)), _floats(values),
        len(positions), _floats(row_scale), int(len(row_scale) > 1), _floats(x), x.shape[0],
        _floats(buffer), _floats(y), y.strides[0] // 4,
    )
    # fmt: on
    _check(status)


def search(model: Model, z: FloatArray, level: int | None = None) -> NDArray[np.uint16]:
    """Paths of the 32 lanes of a stream.

    Args:
        z: float32 (n,), n a multiple of 32.

    Returns:
        uint16 (n,): symbol | union quantizer << 8.
    """
    path = np.empty(len(z), np.uint16)
    target = path.ctypes.data_as(POINTER(ctypes.c_uint16))
    chosen = best_level() if level is None else level
    _library().ectcq_search(chosen, byref(model), _floats(z), len(z), target)
    return path


def encode(model: Model, tile: FloatArray, level: int | None = None) -> bytes:
    """Payload of a tile, float32 (rows, cols)."""
    tile = np.ascontiguousarray(tile)
    payload = np.empty(_library().ectcq_bound(tile.size), np.uint8)
    target = payload.ctypes.data_as(POINTER(c_uint8))
    chosen = best_level() if level is None else level
    size = _library().ectcq_encode(chosen, byref(model), _floats(tile), tile.size, target)
    return payload[:size].tobytes()


def _check(status: int) -> None:
    if status:
        raise CodecError(f"ectcq: {_ERRORS.get(status, f'error {status}')}")
