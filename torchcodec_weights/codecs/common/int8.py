"""Matrices of int8 levels in the compiled library (native/int8.cpp): products and decoded rows."""

import ctypes
from ctypes import POINTER, byref, c_int, c_size_t, c_void_p
from functools import cache

from torchcodec_weights.codecs.common import compiled
from torchcodec_weights.format.dtypes import DTYPE_CODES

PADDING = 16
"""Levels that are read beyond the last row: `kInt8Padding` of native/int8.h."""


class Int8Matrix(ctypes.Structure):
    """A window of a matrix of int8 levels: Int8Matrix of native/layout.h."""

    _fields_ = (
        ("levels", c_void_p),
        ("stride", c_size_t),
        ("rows", c_size_t),
        ("cols", c_size_t),
        ("row_scale", c_void_p),
        ("col_scale", c_void_p),
        ("zero_point", c_void_p),
        ("exact_starts", c_void_p),
        ("exact_columns", c_void_p),
        ("exact_values", c_void_p),
        ("first_col", c_size_t),
    )


@cache
def _library() -> ctypes.CDLL:
    lib = compiled.require("int8", Int8Matrix)
    matrix = POINTER(Int8Matrix)
    lib.codecs_int8_multiply.argtypes = [
        c_int, matrix, c_void_p, c_int, c_size_t, c_void_p, c_void_p, c_int,
    ]  # fmt: skip
    lib.codecs_int8_rows.argtypes = [
        c_int, matrix, c_void_p, c_size_t, c_int, c_void_p, c_int,
    ]  # fmt: skip
    return lib


def multiply(
    matrix: Int8Matrix,
    x: int,
    tokens: int,
    bias: int | None,
    out: int,
    dtype: str,
    threads: int,
    level: int | None = None,
) -> None:
    """x @ W.T + bias, summed in float32.

    Args:
        matrix: W.
        x: address of (tokens, cols) values of `dtype`, contiguous.
        tokens: one or more.
        bias: address of (rows,) values of `dtype`, or None.
        out: address of (tokens, rows) values of `dtype`.
        dtype: one of `DTYPE_CODES`.
        threads: how many to use at most.
        level: index into `compiled.LEVELS`, by default the best.

    Raises:
        CodecError: no memory.
    """
    chosen = compiled.best_level() if level is None else level
    code = DTYPE_CODES[dtype]
    status = _library().codecs_int8_multiply(
        chosen, byref(matrix), x, code, tokens, bias, out, threads
    )
    compiled.check("int8", status)


def rows(
    matrix: Int8Matrix,
    indices: int | None,
    count: int,
    out: int,
    dtype: str,
    threads: int,
    level: int | None = None,
) -> None:
    """Some rows of W, or the first ones.

    Args:
        matrix: W.
        indices: address of (count,) int64, 0 to rows − 1; None for rows 0 to count − 1.
        count: one or more.
        out: address of (count, cols) values of `dtype`.
        dtype: one of `DTYPE_CODES`.
        threads: how many to use at most.
        level: index into `compiled.LEVELS`, by default the best.

    Raises:
        CodecError: no memory.
    """
    chosen = compiled.best_level() if level is None else level
    code = DTYPE_CODES[dtype]
    status = _library().codecs_int8_rows(chosen, byref(matrix), indices, count, code, out, threads)
    compiled.check("int8", status)
