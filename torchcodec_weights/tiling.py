"""Matrix to tiles of whole rows, and tiles to frames of samples."""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


def tile_count(rows: int, cols: int, weights: int) -> int:
    """Number of tiles of about `weights` weights that a matrix of `rows` x `cols` is cut into."""
    return int(np.clip(round(rows * cols / weights), 1, rows))


def tile_bounds(rows: int, tiles: int) -> list[tuple[int, int]]:
    """First row and end row of each tile; sizes differ by one row at most."""
    return [(i * rows // tiles, (i + 1) * rows // tiles) for i in range(tiles)]


MIN_SIDE = 32  # x265 takes no picture smaller than a coding tree unit
_GRANULARITY = 8
_MAX_WIDTH = 4096


def frame_width(cols: int, count: int) -> int:
    """Width of the frame for `count` weights of `cols` columns: 32 to 4096, a multiple of 8.

    Columns are kept as columns where they are of a usable number: a row or column that stays
    unusual after normalization is then a line of the picture, not scattered over it.
    """
    if 64 <= cols <= _MAX_WIDTH and cols % _GRANULARITY == 0:
        return cols
    for parts in range(2, 65):
        width, rest = divmod(cols, parts)
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
