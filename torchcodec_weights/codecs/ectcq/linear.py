"""Products by weights in ECTCQ on the CPU, prepared once: each is one call of compiled code."""

import ctypes
from ctypes import c_int, c_int32, c_size_t
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.base import Product
from torchcodec_weights.codecs.common import compiled
from torchcodec_weights.codecs.common.compiled import MatrixView, best_level, matrix_view
from torchcodec_weights.codecs.ectcq.column_kernels import ColumnClass
from torchcodec_weights.codecs.ectcq.columns import decoder_classes_of_matrix, is_by_columns
from torchcodec_weights.codecs.ectcq.kernels import Tables
from torchcodec_weights.codecs.ectcq.model import tables_of_matrix
from torchcodec_weights.codecs.records import StoredMatrix
from torchcodec_weights.format.tiling import Window

_ALIGNMENT = 64
_CORRECTION = np.dtype([("row", np.uint32), ("column", np.uint32), ("value", np.float32)])
"""Correction of native/products.h."""


class Linear(ctypes.Structure):
    """A linear layer's weight: Linear of codecs/common/native/layout.h."""

    _fields_ = (
        ("matrix", MatrixView),
        ("tables", ctypes.c_void_p),
        ("search", ctypes.c_void_p),
        ("classes", ctypes.c_void_p),
        ("class_count", c_size_t),
        ("of_group", ctypes.c_void_p),
        ("first_row", c_size_t),
        ("end_row", c_size_t),
        ("first_col", c_size_t),
        ("end_col", c_size_t),
        ("states", c_int32),
        ("marks", ctypes.c_void_p),
        ("parts", c_size_t),
        ("corrections", ctypes.c_void_p),
        ("correction_begins", ctypes.c_void_p),
    )


@cache
def _library() -> ctypes.CDLL:
    lib = compiled.require("ectcq", Tables, ColumnClass, Linear)
    pointer, size = ctypes.c_void_p, c_size_t
    lib.ectcq_search_bytes.argtypes = []
    lib.ectcq_search_bytes.restype = size
    lib.ectcq_fill_search.argtypes = [c_int, pointer, pointer]
    lib.ectcq_fill_search.restype = ctypes.c_bool
    lib.ectcq_parts.argtypes = [pointer]
    lib.ectcq_parts.restype = size
    lib.ectcq_mark_bytes.argtypes = []
    lib.ectcq_mark_bytes.restype = size
    lib.ectcq_fill_marks.argtypes = [c_int, pointer, size, pointer, c_int]
    lib.ectcq_fill_marks.restype = c_int
    lib.ectcq_corrections.argtypes = [c_int, pointer]
    lib.ectcq_corrections.restype = size
    lib.ectcq_correct.argtypes = [c_int, pointer, pointer, pointer]
    lib.ectcq_correct.restype = c_int
    lib.ectcq_linear.argtypes = [
        c_int, pointer, pointer, c_int, size, pointer, pointer, c_int,
    ]  # fmt: skip
    lib.ectcq_linear.restype = ctypes.c_int64
    return lib


def _aligned(size: int) -> tuple[NDArray[np.uint8], int]:
    """An array, and the address in it, a multiple of `_ALIGNMENT`, of `size` bytes."""
    array = np.empty(size + _ALIGNMENT, np.uint8)
    return array, -(-array.ctypes.data // _ALIGNMENT) * _ALIGNMENT


class LinearProduct(Product):
    """See linear.cpp.

    Args:
        matrix: its tiles need not be checked; each call does.
        tiles: those that hold the window's rows.
        window: the rows and columns that the weight consists of.
        level: index into `LEVELS`, by default the best.

    Attributes:
        parts: that each tile is divided into.

    Raises:
        CodecError: its entropy model is malformed.
    """

    def __init__(
        self, matrix: StoredMatrix, tiles: range, window: Window, level: int | None = None
    ) -> None:
        self._level = best_level() if level is None else level
        self.parts = 1
        layer = Linear(
            matrix=matrix_view(matrix, tiles),
            first_row=window.first_row,
            end_row=window.first_row + window.rows,
            first_col=window.first_col,
            end_col=window.first_col + window.cols,
            parts=1,
        )
        self._kept: list[Any] = [matrix, layer]
        if is_by_columns(matrix.private):
            classes = decoder_classes_of_matrix(matrix)
            self._kept.append(classes)
            layer.classes = ctypes.addressof(classes.classes)
            layer.class_count = len(classes.classes)
            layer.of_group = classes.of_group.ctypes.data
            layer.states = classes.states
        else:
            tables = tables_of_matrix(matrix)
            search, address = _aligned(_library().ectcq_search_bytes())
            self._kept += tables, search
            layer.tables = ctypes.addressof(tables)
            if _library().ectcq_fill_search(self._level, layer.tables, address):
                layer.search = address
                self._divide(layer)
        self._correct(layer)
        self._layer = ctypes.addressof(layer)
        self._linear = _library().ectcq_linear

    def _divide(self, layer: Linear) -> None:
        """Divide tiles into parts, if they are few."""
        parts = _library().ectcq_parts(ctypes.addressof(layer))
        if parts == 1:
            return
        tiles = layer.matrix.end - layer.matrix.first
        marks, address = _aligned(tiles * parts * _library().ectcq_mark_bytes())
        # Where a tile is damaged, the first product says so.
        if not _library().ectcq_fill_marks(self._level, ctypes.addressof(layer), parts, address, 1):
            self._kept.append(marks)
            layer.marks, layer.parts = address, parts
            self.parts = parts

    def _correct(self, layer: Linear) -> None:
        """Learn what outliers add to weights decoded in their places, if there are any."""
        most = _library().ectcq_corrections(self._level, ctypes.addressof(layer))
        if most == 0:
            return
        corrections = np.empty(most, _CORRECTION)
        begins = np.empty(layer.matrix.end - layer.matrix.first + 1, np.uintp)
        # As in `_divide`.
        if not _library().ectcq_correct(
            self._level, ctypes.addressof(layer), begins.ctypes.data, corrections.ctypes.data
        ):
            self._kept += corrections, begins
            layer.corrections = corrections.ctypes.data
            layer.correction_begins = begins.ctypes.data

    def __call__(
        self, x: int, dtype: int, tokens: int, bias: int | None, y: int, threads: int
    ) -> None:
        status = self._linear(self._level, self._layer, x, dtype, tokens, bias, y, threads)
        if status:
            compiled.check("ectcq", status & 0xFF, status >> 8)
