"""Tiles and frames."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from torchcodec_weights.format.tiling import (
    MIN_SIDE,
    TileGrid,
    frame_shape,
    tile_count,
    tile_grid,
    to_frame,
)

TILE_WEIGHTS = 2**18
SIDE = st.integers(1, 20_000)


@given(SIDE, SIDE)
def test_tiles_are_whole_rows_of_even_size(rows: int, cols: int) -> None:
    blocks = tile_grid((rows, cols), None, TILE_WEIGHTS)
    assert blocks[0].first_row == 0
    assert blocks[-1].end_row == rows
    assert {(block.first_col, block.end_col) for block in blocks} == {(0, cols)}
    sizes = [block.rows for block in blocks]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert all(a.end_row == b.first_row for a, b in pairwise(blocks))
    if cols < TILE_WEIGHTS / 2:
        assert max(sizes) * cols <= 2 * TILE_WEIGHTS


@given(st.integers(1, 500), st.data())
def test_the_band_of_a_row_holds_it(rows: int, data: st.DataObject) -> None:
    grid = TileGrid((rows, 7), data.draw(st.integers(1, rows)), 2)
    for row in range(rows):
        block = grid[grid.band_of(row) * grid.across]
        assert block.first_row <= row < block.end_row
    assert grid.largest == max(block.rows * block.cols for block in grid)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 50), st.integers(1, 50))
def test_blocks_cover_a_matrix_once(rows: int, cols: int, height: int, width: int) -> None:
    covered = np.zeros((rows, cols), int)
    for block in tile_grid((rows, cols), (height, width), 1):
        assert 1 <= block.rows <= height
        assert 1 <= block.cols <= width
        covered[block.first_row : block.end_row, block.first_col : block.end_col] += 1
    assert (covered == 1).all()


@given(SIDE, SIDE)
def test_frames_hold_their_tile_and_little_more(rows: int, cols: int) -> None:
    block = TileGrid((rows, cols), tile_count(rows, cols, TILE_WEIGHTS), 1)[0]
    count = block.rows * cols
    height, width = frame_shape(count, cols)
    assert height * width >= count
    assert height % 8 == width % 8 == 0
    assert min(height, width) >= MIN_SIDE
    if count > 2**16:
        assert height * width < 1.05 * count + 8 * width


def test_samples_round_and_pad_with_gray() -> None:
    tile = np.array([[-0.26, 0.24, 100.0, -100.0]], np.float32)
    frame = to_frame(tile, 0.5, 8).reshape(-1)
    assert frame[:5].tolist() == [127, 128, 255, 0, 128]
    assert (frame[4:] == 128).all()
