"""The compiled library of our own codecs (native/): loaded, checked, and its common structs.

`ctypes` releases the GIL during a call, so tiles are coded in parallel threads.
"""

import ctypes
import platform
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from torchcodec_weights.codecs.records import CodecInfo, StoredMatrix
from torchcodec_weights.errors import CodecError, CodecUnavailableError
from torchcodec_weights.format.dtypes import DTYPE_CODES

MISSING = (
    "its compiled part was not built: install a wheel of torchcodec-weights, or a C++ compiler "
    "(Debian: apt install g++) and then torchcodec-weights from source"
)

LIBRARY = Path(__file__).parent / "libcodecs.so"
_ARM = platform.machine() in ("aarch64", "arm64")
LEVELS = ("scalar", "vector", *(("neon",) if _ARM else ("avx2", "avx512", "avx512_vbmi2")))
TOO_SHORT, BAD_HEADER = 1, 3


class MatrixView(ctypes.Structure):
    """Tiles of a container whose header was read: MatrixView of native/layout.h."""

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
        ("column_order", ctypes.c_void_p),
        ("zero_point", ctypes.c_void_p),
        ("type", c_int),
        ("first", c_size_t),
        ("end", c_size_t),
    )


def matrix_view(matrix: StoredMatrix, tiles: range) -> MatrixView:
    """Some tiles of a matrix; it points into the arrays of `matrix`, which must stay alive."""
    data = np.frombuffer(matrix.data, np.uint8)
    return MatrixView(
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
        column_order=None if matrix.column_order is None else matrix.column_order.ctypes.data,
        zero_point=None if matrix.zero_point is None else matrix.zero_point.ctypes.data,
        type=DTYPE_CODES[matrix.dtype],
        first=tiles.start,
        end=tiles.stop,
    )


@cache
def layout_difference(lib: ctypes.CDLL, mirror: type[ctypes.Structure]) -> str | None:
    """The first difference between a struct of native/layout.h and its mirror.

    A library of another version would read fields at wrong offsets.

    Args:
        mirror: has the name of the struct.

    Returns:
        A message for users that names the field and what to do; None if there is no difference.
    """
    name = mirror.__name__
    here = [(field[0], getattr(mirror, field[0])) for field in mirror._fields_]
    ours = [(field, place.offset, place.size) for field, place in here]
    theirs: list[tuple[str, int, int]] = []
    total = 0
    if hasattr(lib, "codecs_struct_size"):
        size_of, field_of = lib.codecs_struct_size, lib.codecs_struct_field
        size_of.argtypes, size_of.restype = [c_char_p], c_size_t
        field_of.argtypes = [c_char_p, c_size_t, POINTER(c_size_t), POINTER(c_size_t)]
        field_of.restype = c_char_p
        total = size_of(name.encode())
        offset, size = c_size_t(), c_size_t()
        while found := field_of(name.encode(), len(theirs), byref(offset), byref(size)):
            theirs.append((found.decode(), offset.value, size.value))
    ours.append(("the whole", 0, ctypes.sizeof(mirror)))
    theirs.append(("the whole", 0, total))
    for own, other in zip(ours, theirs, strict=False):
        if own != other:
            return (
                f"{LIBRARY.name} is not of this version of torchcodec_weights: a field of {name} "
                f"(name, offset, bytes) is {other} there and {own} here; install "
                "torchcodec-weights again"
            )
    return None


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None if it was not built. Each codec declares the functions that it calls."""
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
    """What a codec can do on this machine that is implemented in the library alone."""
    return _info(codec, lossy, _missing())


@cache  # asked for each weight that is opened
def _info(codec: str, lossy: bool, missing: str | None) -> CodecInfo:
    name = None if missing else f"{codec} ({LEVELS[best_level()]})"
    return CodecInfo(
        name=codec,
        standard="docs/bitstream.md",
        lossy=lossy,
        encoder=name,
        decoders={"cpu": name} if name else {},
        missing=missing,
    )


def _missing(*mirrors: type[ctypes.Structure]) -> str | None:
    """Why the library cannot be used, or None if it can; see `require`."""
    lib = library()
    if lib is None:
        return MISSING
    structs: tuple[type[ctypes.Structure], ...] = (MatrixView, *mirrors)
    differences = (layout_difference(lib, mirror) for mirror in structs)
    return next(filter(None, differences), None)


def require(codec: str, *mirrors: type[ctypes.Structure]) -> ctypes.CDLL:
    """The library, for a codec that needs it.

    Args:
        mirrors: of the structs, besides `MatrixView`, that this codec passes to the library.

    Raises:
        CodecUnavailableError: it was not built, or is of another version.
    """
    lib, missing = library(), _missing(*mirrors)
    if lib is None or missing:
        raise CodecUnavailableError(f"codec {codec!r}: {missing}")
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
        text_of = require(codec).codecs_status_text
        text_of.restype = c_char_p
        text = text_of(status)
        raise CodecError(f"{codec}: {where}{text.decode() if text else f'error {status}'}")
