"""W to Z and back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from torchcodec_weights.matrix import normalize as module
from torchcodec_weights.matrix.normalize import (
    Normalized,
    decode_scale,
    denormalize,
    encode_scale,
    normalize,
)

MATRICES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=70),
    elements=st.floats(-(2.0**60), 2.0**60, width=32),
)


def restore(norm: Normalized, w: NDArray[np.float32]) -> NDArray[np.float32]:
    out = norm.z.copy()
    rows = decode_scale(norm.scale, norm.row_base)
    denormalize(out, rows, decode_scale(norm.act_pre_scale, norm.col_base))
    if norm.zero_point is not None:
        out += norm.zero_point[:, None]
    out.reshape(-1)[norm.outliers] = w.reshape(-1)[norm.outliers]
    return out


@settings(max_examples=300, deadline=None)
@given(MATRICES, st.sampled_from([5.0, None]))
def test_nothing_is_lost(w: NDArray[np.float32], threshold: float | None) -> None:
    norm = normalize(w, threshold)
    assert np.isfinite(norm.z).all()
    assert np.abs(norm.z).max() <= norm.peak
    error = np.abs(restore(norm, w) - w).max()
    assert error <= 1e-5 * np.abs(w).max()


def test_rows_and_columns_have_unit_variance() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((256, 300), np.float32)
    w *= np.exp(0.5 * rng.standard_normal(256, np.float32))[:, None]
    w *= np.exp(0.5 * rng.standard_normal(300, np.float32))
    z = normalize(w, 5.0).z
    assert z.std(axis=1) == pytest.approx(np.ones(256), abs=0.2)
    assert z.std(axis=0) == pytest.approx(np.ones(300), abs=0.06)


def test_outliers_cost_the_others_nothing() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((256, 256), np.float32)
    clean = normalize(w, 5.0)
    spiked = w.copy()
    where = rng.choice(w.size, 20, replace=False)
    spiked.reshape(-1)[where] = 170.0 * rng.choice([-1, 1], 20)
    norm = normalize(spiked, 5.0)
    assert set(where) <= set(norm.outliers)
    others = np.setdiff1d(np.arange(w.size), norm.outliers)
    rows = np.abs(decode_scale(norm.scale, norm.row_base))
    assert rows == pytest.approx(np.abs(decode_scale(clean.scale, clean.row_base)), rel=0.1)
    assert norm.z.reshape(-1)[others].std() == pytest.approx(1.0, abs=0.02)


def test_real_outliers_are_found(spiky: Tensor) -> None:
    w = spiky.numpy()
    norm = normalize(w, 5.0)
    largest = np.argsort(np.abs(w), axis=None)[-5:]
    assert set(largest) <= set(norm.outliers)
    assert len(norm.outliers) < 0.005 * w.size
    assert norm.peak <= 5.0


def test_identity_is_no_field_of_outliers() -> None:
    norm = normalize(np.eye(127, 131, dtype=np.float32), 5.0)
    assert norm.peak <= 12


@pytest.mark.parametrize("value", [0.0, 0.3, -1e-30, 1e30])
def test_constants_leave_nothing_to_code(value: float) -> None:
    w = np.full((100, 200), value, np.float32)
    norm = normalize(w, 5.0)
    assert not norm.z.any()
    assert restore(norm, w) == pytest.approx(w, rel=1e-6)


def test_row_means_are_taken_out_where_that_pays() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 1000), np.float32)
    assert normalize(w, 5.0).zero_point is None
    shifted = w + np.arange(64, dtype=np.float32)[:, None]
    zero_point = normalize(shifted, 5.0).zero_point
    assert zero_point is not None
    assert zero_point == pytest.approx(shifted.mean(1), abs=1e-4)


def test_scales_are_within_half_a_code() -> None:
    rms = np.exp2(np.linspace(-12, 3, 1000)).astype(np.float32)
    codes, base = encode_scale(rms, np.tile(np.array([0, 1], np.uint8), 500))
    decoded = decode_scale(codes, base)
    assert np.abs(np.log2(np.abs(decoded) / rms)).max() <= 1 / 16 + 1e-6
    assert (decoded[1::2] < 0).all()
    assert (decoded[::2] > 0).all()


def test_large_matrices_are_normalized_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same scales as in one piece, and in place where W can be had again."""
    rng = np.random.default_rng(7)
    w = (rng.standard_normal((90, 70)) * np.exp(rng.standard_normal((90, 1)))).astype(np.float32)
    w[5, 7] = 500
    for heavy in (False, True):
        w = w**3 if heavy else w
        expected = normalize(w, 5.0)
        monkeypatch.setattr(module, "_BLOCK", 256)
        calls = []

        def again(w: NDArray[np.float32] = w, calls: list[int] = calls) -> NDArray[np.float32]:
            calls.append(1)
            return w.copy()

        mine = w.copy()
        norm = normalize(mine, 5.0, again=again)
        monkeypatch.undo()
        assert len(calls) == heavy
        assert heavy or norm.z is mine
        assert np.array_equal(norm.z, expected.z)
        assert np.array_equal(norm.scale, expected.scale)
        assert np.array_equal(norm.act_pre_scale, expected.act_pre_scale)
        assert np.array_equal(norm.outliers, expected.outliers)
        assert norm.peak == expected.peak
