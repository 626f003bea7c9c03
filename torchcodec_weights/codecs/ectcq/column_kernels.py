"""The compiled part of ECTCQ's streams by columns: columns.cpp and encode_columns.cpp."""

import ctypes
from ctypes import POINTER, byref, c_bool, c_float, c_int, c_int32, c_size_t, c_uint8, c_uint32
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.common import compiled
from torchcodec_weights.codecs.common.compiled import MatrixView, best_level
from torchcodec_weights.codecs.ectcq.kernels import SYMBOLS, Model, Tables, trellises
from torchcodec_weights.codecs.records import ErrorFeedback, FloatArray
from torchcodec_weights.format.dtypes import DTYPE_CODES


class ColumnClass(ctypes.Structure):
    """A class of columns, for the decoder: ColumnClass of codecs/common/native/layout.h."""

    _fields_ = (
        ("frequency", ctypes.c_uint16 * (2 * SYMBOLS)),
        ("values", c_float * (2 * SYMBOLS)),
    )


@dataclass(frozen=True, eq=False)
class DecoderClasses:
    """What the decoder of a matrix needs of its classes of columns.

    Attributes:
        classes: array of `ColumnClass`.
        states: of the trellis.
        of_group: uint8 (groups,), the class of each group of 32 columns in coded order.
    """

    classes: Any
    states: int
    of_group: NDArray[np.uint8]

    def arguments(self) -> tuple[Any, ...]:
        return self.classes, len(self.classes), self.states, _bytes(self.of_group)


@dataclass(frozen=True, eq=False)
class SearchClasses:
    """What the trellis search of a matrix needs of its classes of columns.

    Attributes:
        models: array of `Model`.
        kept: the arrays that they point into.
        of_group: uint8 (groups,), the model of each group of 32 columns in coded order.
    """

    models: Any
    kept: tuple[NDArray[np.uint8], ...]
    of_group: NDArray[np.uint8]


@cache
def _library() -> ctypes.CDLL:
    lib = compiled.require("ectcq", Tables, ColumnClass, Model)
    u8, f32, u16, u32 = (
        POINTER(c_uint8),
        POINTER(c_float),
        POINTER(ctypes.c_uint16),
        POINTER(c_uint32),
    )
    size, failed = c_size_t, POINTER(c_size_t)
    classes: list[Any] = [c_int, POINTER(ColumnClass), size, c_int32, u8]
    lib.ectcq_decode_columns.argtypes = [*classes, ctypes.c_char_p, size, size, size, f32]
    lib.ectcq_decode_column_matrix.argtypes = [
        *classes, POINTER(MatrixView), c_int, ctypes.c_void_p, c_int, failed,
    ]  # fmt: skip
    lib.ectcq_multiply_column_matrix.argtypes = [
        *classes, POINTER(MatrixView), f32, size, f32, c_int, failed,
    ]  # fmt: skip
    lib.ectcq_search_level.argtypes = []
    lib.ectcq_search_level.restype = c_int
    lib.ectcq_column_height.argtypes = [size]
    lib.ectcq_column_height.restype = size
    lib.ectcq_search_columns.argtypes = [
        c_int, POINTER(Model), u8, f32, size, size, f32, u32, f32, u16,
    ]  # fmt: skip
    lib.ectcq_search_columns.restype = c_bool
    lib.ectcq_columns_bound.argtypes = [size, size]
    lib.ectcq_columns_bound.restype = size
    lib.ectcq_write_columns.argtypes = [POINTER(Model), u8, u16, size, size, u8]
    lib.ectcq_write_columns.restype = size
    return lib


def _bytes(array: NDArray[np.uint8]) -> Any:
    return array.ctypes.data_as(POINTER(c_uint8))


def _floats(array: FloatArray) -> Any:
    return array.ctypes.data_as(POINTER(c_float))


def decode_columns(
    classes: DecoderClasses, payload: bytes, out: FloatArray, level: int | None = None
) -> None:
    """Decode one payload into `out`, float32 (rows, cols) in coded order, C-contiguous, not scaled.

    Args:
        level: index into `LEVELS`, by default the best.

    Raises:
        CodecError: the payload does not fit.
    """
    chosen = best_level() if level is None else level
    rows, cols = out.shape
    status = _library().ectcq_decode_columns(
        chosen, *classes.arguments(), payload, len(payload), rows, cols, _floats(out)
    )
    compiled.check("ectcq", status)


def decode_matrix(
    classes: DecoderClasses,
    matrix: MatrixView,
    out: int,
    dtype: str,
    threads: int,
    level: int | None = None,
) -> None:
    """Decode the rows of some tiles, checksums, scales, outliers and the columns' order included.

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
    status = _library().ectcq_decode_column_matrix(
        chosen, *classes.arguments(), byref(matrix), DTYPE_CODES[dtype], out, threads,
        byref(failed),
    )
    # fmt: on
    compiled.check("ectcq", status, failed.value)


def multiply_matrix(
    classes: DecoderClasses,
    matrix: MatrixView,
    scaled: FloatArray,
    product: FloatArray,
    threads: int,
    level: int | None = None,
) -> None:
    """Decode a few rows of 32 columns at a time and multiply; see columns.cpp.

    Args:
        scaled: float32 (tokens, cols), C-contiguous, columns multiplied by their scales, in their
            own order.
        product: float32 (tokens, rows), C-contiguous; the tiles' rows are written.
        threads: how many to use.
        level: index into `LEVELS`, by default the best.

    Raises:
        CodecError: a tile is corrupt.
    """
    chosen = best_level() if level is None else level
    failed = c_size_t()
    # fmt: off
    status = _library().ectcq_multiply_column_matrix(
        chosen, *classes.arguments(), byref(matrix), _floats(scaled), len(scaled),
        _floats(product), threads, byref(failed),
    )
    # fmt: on
    compiled.check("ectcq", status, failed.value)


def search_columns(
    classes: SearchClasses,
    tile: FloatArray,
    feedback: ErrorFeedback | None,
    level: int | None = None,
) -> tuple[FloatArray, NDArray[np.uint16]]:
    """Search the path of each column of a tile, errors carried from column to column.

    Args:
        tile: float32 (rows, cols) in coded order.
        level: index into `LEVELS`, by default the best.

    Returns:
        By column, both (cols, rows): float32, what was searched, the tile less the errors carried
        into it; and uint16, symbol | union quantizer << 8.

    Raises:
        ValueError: the feedback's arrays do not fit the tile, or there is no trellis of the models'
            number of states.
    """
    weights, path = _search(classes, tile, feedback, level)
    return weights[:, : len(tile)], path[:, : len(tile)]


def encode_columns(
    classes: SearchClasses,
    tile: FloatArray,
    feedback: ErrorFeedback | None,
    level: int | None = None,
) -> bytes:
    """Payload of a tile, with the arguments and errors of `search_columns`."""
    _, path = _search(classes, tile, feedback, level)
    rows, cols = tile.shape
    payload = np.empty(_library().ectcq_columns_bound(rows, cols), np.uint8)
    size = _library().ectcq_write_columns(
        classes.models,
        _bytes(classes.of_group),
        path.ctypes.data_as(POINTER(ctypes.c_uint16)),
        rows,
        cols,
        _bytes(payload),
    )
    return payload[:size].tobytes()


def _search(
    classes: SearchClasses, tile: FloatArray, feedback: ErrorFeedback | None, level: int | None
) -> tuple[FloatArray, NDArray[np.uint16]]:
    """As `search_columns`, with columns padded as the library wants them."""
    tile = np.ascontiguousarray(tile, np.float32)
    rows, cols = tile.shape
    factors = order = None
    if feedback is not None:
        check_feedback(feedback, cols)
        factors = np.ascontiguousarray(feedback.factors, np.float32)
        order = np.ascontiguousarray(feedback.order, np.uint32)
    height = _library().ectcq_column_height(rows)
    weights = np.empty((cols, height), np.float32)
    path = np.empty((cols, height), np.uint16)
    searched = _library().ectcq_search_columns(
        _library().ectcq_search_level() if level is None else level,
        classes.models,
        _bytes(classes.of_group),
        _floats(tile),
        rows,
        cols,
        None if factors is None else _floats(factors),
        None if order is None else order.ctypes.data_as(POINTER(c_uint32)),
        _floats(weights),
        path.ctypes.data_as(POINTER(ctypes.c_uint16)),
    )
    if not searched:
        found = sorted({model.states for model in classes.models})
        allowed = ", ".join(map(str, trellises()))
        raise ValueError(f"classes.models: states {found}: allowed: {allowed}")
    return weights, path


def check_feedback(feedback: ErrorFeedback, cols: int) -> None:
    """Reject feedback that is not of a matrix of so many columns.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    if feedback.factors.shape != (cols, cols):
        raise ValueError(
            f"feedback.factors: shape {feedback.factors.shape} with {cols} columns: allowed: "
            f"({cols}, {cols})"
        )
    if feedback.order.shape != (cols,) or (np.sort(feedback.order) != np.arange(cols)).any():
        raise ValueError(
            f"feedback.order: {feedback.order.tolist()[:8]}… with {cols} columns: allowed: each "
            f"number from 0 to {cols - 1} once"
        )
