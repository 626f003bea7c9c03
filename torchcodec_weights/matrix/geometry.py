"""Checks of the attributes of a weight besides its bitstream: shape, dtype, window, transposed.

A file may hold any values, so these functions take any. They return why the values are refused, in
words for users, or None. Without PyTorch, whose dtypes and symbols callers name.
"""

from collections.abc import Collection
from math import prod
from typing import Any

_MAX_SIDE = 2**32


def refused_geometry(
    logical_shape: Any,
    logical_dtype: Any,
    window: Any,
    transposed: Any,
    dtypes: Collection[Any],
    symbols: tuple[type, ...] = (),
) -> str | None:
    """Why no weight can have these attributes, whatever its bitstream is.

    Args:
        logical_shape, logical_dtype, window, transposed: as in `CodecTensor`.
        dtypes: that weights can have.
        symbols: types that sizes can have besides int.
    """
    if not _are_sizes(logical_shape, symbols) or not logical_shape:
        return f"logical_shape={logical_shape!r}: allowed: a list of sizes"
    if prod(logical_shape) >= 2**63:
        return f"logical_shape={logical_shape!r}: allowed: fewer than 2^63 weights"
    if logical_dtype not in dtypes:
        allowed = ", ".join(map(str, dtypes))
        return f"logical_dtype={logical_dtype!r}: allowed: {allowed}"
    if window is not None and not (_are_sizes(window, symbols) and len(window) == 4):
        return f"window={window!r}: allowed: None, or first row, rows, first column, columns"
    if transposed is not None and type(transposed) is not bool:
        return f"transposed={transposed!r}: allowed: None, True, False"
    return None


def _are_sizes(values: Any, symbols: tuple[type, ...]) -> bool:
    """Whether this is a list of sizes that tensors can have."""
    if type(values) is not list:
        return False
    for value in values:
        if type(value) is int:
            if not 0 <= value < _MAX_SIDE:
                return False
        elif not isinstance(value, symbols):
            return False
    return True


def resolved_window(
    logical_shape: list[int], window: list[int] | None, transposed: bool | None
) -> list[int]:
    """First row, rows, first column, columns: `window`, or the whole matrix if it is None.

    Args:
        logical_shape, window, transposed: as in `CodecTensor`, not refused by `refused_window`.
    """
    if window is not None:
        return window
    rows, cols = logical_shape[:: -1 if transposed else 1]
    return [0, rows, 0, cols]


def refused_window(
    logical_shape: list[int],
    window: list[int] | None,
    transposed: bool | None,
    matrix: tuple[int, int],
) -> str | None:
    """Why an encoded matrix has no such window, or the window no such shape.

    Args:
        logical_shape, window, transposed: as in `CodecTensor`, not refused by `refused_geometry`.
        matrix: rows and columns of the matrix.
    """
    if window is None:
        whole = list(matrix[:: -1 if transposed else 1])
        if logical_shape != whole:
            return (
                f"logical_shape={logical_shape} of a matrix of {matrix[0]}x{matrix[1]}: allowed: "
                f"{whole}, or a window"
            )
        return None
    first_row, rows, first_col, cols = window
    if not (rows and cols and first_row + rows <= matrix[0] and first_col + cols <= matrix[1]):
        shape = f"{matrix[0]}x{matrix[1]}"
        return f"window={window} of a matrix of {shape}: allowed: rows and columns of it"
    if transposed:
        columns = set(logical_shape[-2:-1])
    else:
        # The last dimensions make up a row. A flat view (FSDP2's shards are such) has no rows.
        columns = {prod(logical_shape[i:]) for i in range(1, len(logical_shape))} or {cols}
    if prod(logical_shape) != rows * cols or cols not in columns:
        return (
            f"logical_shape={logical_shape} of {rows} rows and {cols} columns"
            f"{', transposed' if transposed else ''}: allowed: a shape of so many"
        )
    return None
