"""Tiles and frames."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from torchcodec_weights.tiling import (
    MIN_SIDE,
    frame_shape,
    tile_bounds,
    tile_count,
    to_frame,
)

TILE_WEIGHTS = 2**18
SIDE = st.integers(1, 20_000)


@given(SIDE, SIDE)
def test_tiles_are_whole_rows_of_even_size(rows: int, cols: int) -> None:
    bounds = tile_bounds(rows, tile_count(rows, cols, TILE_WEIGHTS))
    assert bounds[0][0] == 0
    assert bounds[-1][1] == rows
    sizes = [end - first for first, end in bounds]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
    if cols < TILE_WEIGHTS / 2:
        assert max(sizes) * cols <= 2 * TILE_WEIGHTS


@given(SIDE, SIDE)
def test_frames_hold_their_tile_and_little_more(rows: int, cols: int) -> None:
    first, end = tile_bounds(rows, tile_count(rows, cols, TILE_WEIGHTS))[0]
    count = (end - first) * cols
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
