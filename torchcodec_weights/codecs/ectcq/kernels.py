"""The compiled part of ECTCQ, through its C interface (native/api.cpp).

`ctypes` lets go of the GIL during a call, so tiles are coded in parallel threads.
"""

import ctypes
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_size_t, c_uint8, c_uint32
from functools import cache
from importlib.util import find_spec
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

LEVELS = ("scalar", "vector", "avx2", "avx512")
_ERRORS = {
    1: "stream ends before its weights do",
    2: "stream has bytes left over",
    3: "stream has a tail longer than itself",
    4: "checksum (CRC-32C) does not match",
    5: "outlier section is malformed",
    6: "no memory for a tile",
}
OUT_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}


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


class Matrix(ctypes.Structure):
    """A container with its header read; see matrix.cpp."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", c_size_t),
        ("tiles", c_size_t),
        ("offsets", ctypes.c_void_p),
        ("payload_sizes", ctypes.c_void_p),
        ("outlier_sizes", ctypes.c_void_p),
        ("crcs", ctypes.c_void_p),
        ("rows", c_size_t),
        ("cols", c_size_t),
        ("row_scale", ctypes.c_void_p),
        ("row_stride", c_size_t),
        ("col_scale", ctypes.c_void_p),
        ("col_stride", c_size_t),
        ("zero_point", ctypes.c_void_p),
        ("type", c_int),
        ("first", c_size_t),
        ("end", c_size_t),
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
    lib.ectcq_use_openmp.argtypes = [ctypes.c_void_p]
    lib.ectcq_decode.argtypes = [c_int, POINTER(Tables), ctypes.c_char_p, size, size, f32]
    failed = POINTER(c_size_t)
    lib.ectcq_decode_matrix.argtypes = [
        c_int, POINTER(Tables), POINTER(Matrix), c_int, ctypes.c_void_p, c_int, failed,
    ]  # fmt: skip
    lib.ectcq_multiply_matrix.argtypes = [
        c_int, POINTER(Tables), POINTER(Matrix), f32, size, f32, c_int, failed,
    ]  # fmt: skip
    lib.ectcq_search.argtypes = [c_int, POINTER(Model), f32, size, u16]
    lib.ectcq_search.restype = None
    lib.ectcq_bound.argtypes = [size]
    lib.ectcq_bound.restype = size
    lib.ectcq_encode.argtypes = [c_int, POINTER(Model), f32, size, u8]
    lib.ectcq_encode.restype = size
    if parallel := _openmp():
        lib.ectcq_use_openmp(parallel)
    return lib


def _openmp() -> Any:
    """GOMP_parallel of the OpenMP runtime that PyTorch brings, or None; see threads.h."""
    spec = find_spec("torch")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in (Path(folder) / "lib").glob("libgomp*"):
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p)
    return None


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


def decode(tables: Tables, payload: bytes, out: FloatArray, level: int | None = None) -> None:
    """Decode one payload into `out`, float32, C-contiguous, not scaled.

    Args:
        level: index into `LEVELS`, by default the best.

    Raises:
        CodecError: the payload does not fit.
    """
    chosen = best_level() if level is None else level
    decoded = _library().ectcq_decode
    _check(decoded(chosen, byref(tables), payload, len(payload), out.size, _floats(out)))


def decode_matrix(tables: Tables, matrix: Matrix, out: int, dtype: str, threads: int) -> None:
    """Decode the rows of some tiles, checksums, scales and outliers included.

    Args:
        out: address of as many values of `dtype`, one of `OUT_TYPES`.
        threads: how many to use.

    Raises:
        CodecError: a tile is corrupt.
    """
    failed = c_size_t()
    # fmt: off
    status = _library().ectcq_decode_matrix(
        best_level(), byref(tables), byref(matrix), OUT_TYPES[dtype], out, threads, byref(failed)
    )
    # fmt: on
    _check(status, failed.value)


def multiply_matrix(
    tables: Tables,
    matrix: Matrix,
    scaled: FloatArray,
    product: FloatArray,
    threads: int,
) -> None:
    """Decode tile by tile and multiply; see matrix.cpp.

    Args:
        scaled: float32 (tokens, cols), C-contiguous, columns multiplied by their scales.
        product: float32 (tokens, rows), C-contiguous; the tiles' rows are written.
        threads: how many to use.

    Raises:
        CodecError: a tile is corrupt.
    """
    failed = c_size_t()
    # fmt: off
    status = _library().ectcq_multiply_matrix(
        best_level(), byref(tables), byref(matrix), _floats(scaled), len(scaled), _floats(product),
        threads, byref(failed),
    )
    # fmt: on
    _check(status, failed.value)


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


def _check(status: int, tile: int | None = None) -> None:
    if status:
        where = "" if tile is None else f"tile {tile} is corrupt: "
        raise CodecError(f"ectcq: {where}{_ERRORS.get(status, f'error {status}')}")
