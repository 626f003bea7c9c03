"""The order of rows and columns in which codecs get a tile: by their scales, so none is stored.

Scales say how much the model suffers from an error in a row or column. Sorted by them, neighbours
have like variance, which contexts of picture codecs and classes of entropy tables make use of.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def sorted_order(codes: NDArray[np.uint8], count: int) -> NDArray[np.uint32]:
    """Stable order of rows or columns by the magnitude of their scales, the smallest first.

    Args:
        codes: scale codes, uint8 (count,), or (1,) where one serves all.

    Returns:
        uint32 (count,): the row or column at each place.
    """
    if len(codes) != count:
        return np.arange(count, dtype=np.uint32)
    return np.argsort(codes & 127, kind="stable").astype(np.uint32)


def sorted_rows(codes: NDArray[np.uint8], first: int, end: int) -> NDArray[np.uint32]:
    """`sorted_order` of the rows of a tile, counted from `first`.

    Args:
        codes: scale codes of all rows, or (1,).
        first, end: rows of the tile.
    """
    return sorted_order(codes if len(codes) == 1 else codes[first:end], end - first)


def restore_order(
    z: NDArray[Any], rows: NDArray[np.uint32] | None, columns: NDArray[np.uint32] | None
) -> None:
    """Put the rows and columns of a tile back where they were, in place.

    Args:
        z: (n, m), in the order that a codec got.
        rows, columns: of `sorted_order`, (n,) and (m,), or None if they were not sorted.
    """
    if columns is not None:
        z[:] = z[:, np.argsort(columns)]
    if rows is not None:
        z[:] = z[np.argsort(rows)]
