"""The library of the codecs that we compile (native/), and what its parts have in common.

`ctypes` lets go of the GIL during a call, so tiles are coded in parallel threads.
"""

import ctypes
from ctypes import c_int, c_size_t
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from torchcodec_weights.codecs.base import CodecInfo, StoredMatrix
from torchcodec_weights.errors import CodecError, CodecUnavailableError

MISSING = (
    "its compiled part was not built: install a wheel of torchcodec-weights, or a C++ compiler "
    "(Debian: apt install g++) and then torchcodec-weights from source"
)

LIBRARY = Path(__file__).parent / "libcodecs.so"
LEVELS = ("scalar", "vector", "avx2", "avx512")
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
TOO_SHORT, BAD_HEADER = 1, 3
_ERRORS = {
    1: "stream ends before its weights do",
    2: "stream has bytes left over",
    3: "sizes or tables of a stream do not fit",
    4: "checksum (CRC-32C) does not match",
    5: "outlier section is malformed",
    6: "no memory for a tile",
}


class Matrix(ctypes.Structure):
    """A container with its header read; see native/matrix.h."""

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


def laid_out(matrix: StoredMatrix, tiles: range) -> Matrix:
    """Some tiles of a matrix; points into the arrays of `matrix`, which must live on."""
    data = np.frombuffer(matrix.data, np.uint8)
    return Matrix(
        data=data.ctypes.data,
        size=data.size,
        tiles=len(matrix.offsets),
        offsets=matrix.offsets.ctypes.data,
        payload_sizes=matrix.payload_sizes.ctypes.data,
        outlier_sizes=matrix.outlier_sizes.ctypes.data,
        crcs=matrix.crcs.ctypes.data,
        rows=matrix.rows,
        cols=matrix.cols,
        row_scale=matrix.row_scale.ctypes.data,
        row_stride=int(len(matrix.row_scale) > 1),
        col_scale=matrix.col_scale.ctypes.data,
        col_stride=int(len(matrix.col_scale) > 1),
        zero_point=None if matrix.zero_point is None else matrix.zero_point.ctypes.data,
        type=DTYPES[matrix.dtype],
        first=tiles.start,
        end=tiles.stop,
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled part, or None where it was not built. Its users declare their functions."""
    try:
        lib = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    lib.codecs_best_level.restype = c_int
    lib.codecs_use_openmp.argtypes = [ctypes.c_void_p]
    if parallel := _openmp():
        lib.codecs_use_openmp(parallel)
    return lib


def _openmp() -> Any:
    """GOMP_parallel of the OpenMP runtime that PyTorch brings, or None; see threads.h."""
    spec = find_spec("torch")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in (Path(folder) / "lib").glob("libgomp*"):
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p)
    return None


def info(codec: str, *, lossy: bool) -> CodecInfo:
    """What there is of a codec that is all in the compiled part."""
    built = library() is not None
    name = f"{codec} ({LEVELS[best_level()]})" if built else None
    return CodecInfo(
        name=codec,
        standard="docs/bitstream.md",
        lossy=lossy,
        encoder=name,
        decoders={"cpu": name} if name else {},
        missing=None if built else MISSING,
    )


def require(codec: str) -> ctypes.CDLL:
    """The compiled part, for a codec that cannot do without."""
    lib = library()
    if lib is None:
        raise CodecUnavailableError(f"codec {codec!r}: {MISSING}")
    return lib


@cache
def best_level() -> int:
    """The best instruction set of this processor, an index into `LEVELS`."""
    lib = library()
    assert lib is not None
    return int(lib.codecs_best_level())


def check(codec: str, status: int, tile: int | None = None) -> None:
    """Raise CodecError for a status that is not 0 (native/rans.h)."""
    if status:
        where = "" if tile is None else f"tile {tile} is corrupt: "
        raise CodecError(f"{codec}: {where}{_ERRORS.get(status, f'error {status}')}")
