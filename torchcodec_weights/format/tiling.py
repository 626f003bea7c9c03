"""Cuts a matrix into tiles, of whole rows or blocks, and turns tiles into frames of samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


def tile_count(rows: int, cols: int, weights: int) -> int:
    """Number of tiles of about `weights` weights that a matrix of `rows` x `cols` is cut into."""
    return int(np.clip(round(rows * cols / weights), 1, rows))


class Block(NamedTuple):
    """Rows and columns of a tile in its matrix."""

    first_row: int
    end_row: int
    first_col: int
    end_col: int

    @property
    def rows(self) -> int:
        """Height."""
        return self.end_row - self.first_row

    @property
    def cols(self) -> int:
        """Width."""
        return self.end_col - self.first_col


class Window(NamedTuple):
    """The rows and columns of an encoded matrix that a weight consists of."""

    first_row: int
    rows: int
    first_col: int
    cols: int

    def holds(self, other: "Window") -> bool:
        """Whether another window of the same matrix lies in this one."""
        return (
            self.first_row <= other.first_row
            and other.first_row + other.rows <= self.first_row + self.rows
            and self.first_col <= other.first_col
            and other.first_col + other.cols <= self.first_col + self.cols
        )

    def slices_of(self, other: "Window") -> tuple[slice, slice]:
        """Which rows and columns of this window another one has, which lies in it."""
        row, col = other.first_row - self.first_row, other.first_col - self.first_col
        return slice(row, row + other.rows), slice(col, col + other.cols)


@dataclass(frozen=True)
class TileGrid(Sequence[Block]):
    """All tiles of a matrix, row by row; their heights, and their widths, differ by one at most.

    Blocks are computed on access, as a container may list millions of tiles.

    Attributes:
        shape: rows and columns of the matrix.
        down, across: number of tiles below each other and beside each other.
    """

    shape: tuple[int, int]
    down: int
    across: int

    def __len__(self) -> int:
        return self.down * self.across

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> list[Block]: ...
    def __getitem__(self, index: int | slice) -> Block | list[Block]:
        if isinstance(index, slice):
            return [self._block(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"tile {index} of {len(self)}")
        return self._block(index % len(self))

    def _block(self, index: int) -> Block:
        i, j = divmod(index, self.across)
        rows, cols = self.shape
        return Block(
            i * rows // self.down,
            (i + 1) * rows // self.down,
            j * cols // self.across,
            (j + 1) * cols // self.across,
        )

    def band_of(self, row: int) -> int:
        """Which of the `down` bands of tiles holds a row: the i with first_row ≤ row < end_row."""
        return ((row + 1) * self.down - 1) // self.shape[0]

    @property
    def largest(self) -> int:
        """Weights of the largest tile."""
        rows, cols = self.shape
        return -(-rows // self.down) * -(-cols // self.across)


def tile_grid(shape: tuple[int, int], tile_shape: Sequence[int] | None, weights: int) -> TileGrid:
    """The tiles that a matrix of `shape` is cut into.

    Args:
        tile_shape: the largest rows and columns of a tile; None for whole rows, with about
            `weights` weights in a tile.
    """
    rows, cols = shape
    if tile_shape is None:
        return TileGrid(shape, tile_count(rows, cols, weights), 1)
    return TileGrid(shape, -(-rows // tile_shape[0]), -(-cols // tile_shape[1]))


MIN_SIDE = 32  # x265 takes no picture smaller than a coding tree unit
_GRANULARITY = 8
_MAX_WIDTH = 4096


def frame_width(cols: int, count: int) -> int:
    """Width of the frame for `count` weights of `cols` columns: 32 to 4096, a multiple of 8.

    If possible, a column of the matrix is a column of the frame. Then a row or column that stays
    unusual after normalization is a line of the picture, and not scattered over it.
    """
    if 64 <= cols <= _MAX_WIDTH and cols % _GRANULARITY == 0:
        return cols
    for lines in range(2, 65):  # of the frame, for one row of the matrix
        width, rest = divmod(cols, lines)
        if rest == 0 and 512 <= width <= _MAX_WIDTH and width % _GRANULARITY == 0:
            return width
    width = _round_up(int(np.ceil(np.sqrt(count))), _GRANULARITY)
    return int(np.clip(width, MIN_SIDE, _MAX_WIDTH))


def frame_shape(count: int, cols: int) -> tuple[int, int]:
    """Height and width of the frame that holds `count` weights in row-major order."""
    width = frame_width(cols, count)
    return max(MIN_SIDE, _round_up(-(-count // width), _GRANULARITY)), width


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def to_frame(tile: FloatArray, unit: float, depth: int) -> NDArray[np.uint16]:
    """Samples of a tile (rows, cols): value / unit around mid-gray, padded to its frame."""
    height, width = frame_shape(tile.size, tile.shape[1])
    middle = 2 ** (depth - 1)
    frame = np.full(height * width, middle, np.uint16)
    samples = np.rint(tile.reshape(-1) * np.float32(1.0 / unit)) + middle
    frame[: tile.size] = np.clip(samples, 0, 2 * middle - 1)
    return frame.reshape(height, width)
