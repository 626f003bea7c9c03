"""Scales by importance, error feedback's factors, and the rate of what spreads."""

import numpy as np
import pytest
import torch
from torch import Tensor

from torchcodec_weights.codecs.records import EncoderSettings
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.encoder.prepare import by_importance
from torchcodec_weights.encoder.spread import Spread
from torchcodec_weights.matrix.feedback import prediction
from torchcodec_weights.matrix.importance import Importance
from torchcodec_weights.matrix.normalize import SIGN_SEED, denormalize
from torchcodec_weights.matrix.weighted import normalize_weighted, take_outliers

ECTCQ = get_codec("ectcq")


def moments(cols: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((8 * cols, cols)) * np.exp(rng.uniform(-2, 2, cols))
    x[:, 1:] += 0.7 * x[:, :-1]
    return (x.T @ x / len(x)).astype(np.float32)


@pytest.mark.parametrize("even", [False, True])
def test_steps_follow_importance(even: bool, query: Tensor) -> None:
    rng = np.random.default_rng(0)
    w = query.numpy()
    rows = np.exp(rng.uniform(-3, 3, len(w))).astype(np.float32)
    columns = np.exp(rng.uniform(-5, 5, w.shape[1])).astype(np.float32)
    norm = normalize_weighted(w, rows, columns, SIGN_SEED, even_rows=even)
    assert np.sqrt(np.square(norm.z).mean()) == pytest.approx(1, rel=1e-3)
    back = norm.z.copy()
    denormalize(back, norm.row_scale, norm.col_scale)
    np.testing.assert_allclose(back, w, rtol=1e-5, atol=1e-7)
    # Codes are 2^(1/8) apart, so a scale is off by half of that at most, and two by all of it.
    product = np.abs(norm.col_scale) * np.sqrt(columns)
    assert product.max() / product.min() <= 2 ** (1 / 8) * 1.001
    rms = np.sqrt(np.square(w).mean(axis=1))
    exact = np.sqrt(rms / np.sqrt(rows)) if even else 1 / np.sqrt(rows)
    product = np.abs(norm.row_scale) / exact
    assert product.max() / product.min() <= 2 ** (1 / 8) * 1.001
    assert 0.4 < (norm.col_scale < 0).mean() < 0.6


def test_nothing_important_is_no_division_by_zero() -> None:
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    rows, columns = np.zeros(64, np.float32), np.zeros(64, np.float32)
    columns[3] = 1
    norm = normalize_weighted(w, rows, columns, SIGN_SEED, even_rows=True)
    assert np.isfinite(norm.z).all()
    back = norm.z.copy()
    denormalize(back, norm.row_scale, norm.col_scale)
    np.testing.assert_allclose(back, w, rtol=1e-5)
    zeros = np.zeros_like(w)
    assert not normalize_weighted(zeros, rows, columns, SIGN_SEED, even_rows=True).z.any()


def test_outliers_are_taken_out() -> None:
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    w[3, 5] = 1000
    ones = np.ones(64, np.float32)
    norm = normalize_weighted(w, ones, ones, SIGN_SEED, even_rows=False)
    limit = 0.5 * norm.peak
    rest = take_outliers(norm, limit)
    assert rest.outliers.tolist() == [3 * 64 + 5]
    assert rest.z[3, 5] == 0
    assert rest.peak == np.abs(rest.z).max() < limit


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_prediction_is_the_least_squares_one(shrinkage: float) -> None:
    cols = 40
    h = moments(cols).astype(np.float64)
    found = prediction(h.astype(np.float32), shrinkage)
    shrunk = (1 - shrinkage) * h + shrinkage * np.diag(np.diag(h))
    shrunk += 1e-6 * np.diag(np.diag(h))
    order = found.order
    assert np.all(np.diff(np.diag(h)[order]) <= 0)
    for place, column in enumerate(order):
        later = order[place + 1 :]
        # What the later columns can undo of an error: its regression on their inputs.
        undone = np.linalg.solve(shrunk[np.ix_(later, later)], shrunk[later, column])
        np.testing.assert_allclose(-found.factors[column, later], undone, rtol=1e-3, atol=1e-4)
        assert not found.factors[column, order[: place + 1]].any()
        variance = shrunk[column, column] - shrunk[column, later] @ undone
        assert found.variances[column] == pytest.approx(variance, rel=1e-3)


def test_inputs_that_are_always_zero() -> None:
    h = moments(16)
    h[3], h[:, 3] = 0, 0
    found = prediction(h)
    assert np.isfinite(found.factors).all()
    assert (found.variances > 0).all()
    assert found.order[-1] == 3
    assert np.isfinite(prediction(np.zeros((8, 8), np.float32)).variances).all()


def test_feedback_in_coded_order_lowers_the_output_s_error(query: Tensor) -> None:
    """The recursion of `ErrorFeedback` with a uniform quantizer, in the order of the codec."""
    w, h = query.numpy(), moments(query.shape[1])
    importance = Importance(np.ones(len(w), np.float32), h)
    ready = by_importance(w, importance, ECTCQ, EncoderSettings(), 3.0, SIGN_SEED)
    assert ready.feedback is not None
    columns = np.argsort(ready.norm.act_pre_scale & 127, kind="stable")
    step = 0.3

    def cost(factors: np.ndarray) -> float:
        z = ready.norm.z[:, columns].astype(np.float64)
        decoded = np.empty_like(z)
        for column in ready.feedback.order:
            decoded[:, column] = step * np.rint(z[:, column] / step)
            z -= np.outer(z[:, column] - decoded[:, column], factors[column])
        error = (decoded - ready.norm.z[:, columns]) * ready.norm.row_scale[:, None]
        error *= ready.norm.col_scale[columns]
        return float(np.einsum("ij,jk,ik->", error, h[np.ix_(columns, columns)], error))

    factors = ready.feedback.factors
    assert cost(factors) < 0.75 * cost(np.zeros_like(factors))


def test_spread_is_the_curve_where_variances_are_one() -> None:
    z = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).numpy()
    z /= np.sqrt(np.square(z).mean(axis=0))
    curve = ECTCQ.rate_curve(EncoderSettings())
    spread = Spread(z)
    for x in (-3.0, -1.0, 0.0):
        assert spread.bits(x, curve) == pytest.approx(curve.rate(x), abs=0.1)
        assert spread.log2_step_for(spread.bits(x, curve), curve) == pytest.approx(x, abs=1e-3)
    assert 0 < spread.bits(3.0, curve) < 0.05
    scales = np.repeat(np.float32([0.25, 4]), 256)
    mixed = Spread(z * scales, columns=np.square(1 / scales))
    assert mixed.bits(-1.0, curve) == pytest.approx(spread.bits(-1.0, curve), abs=0.02)
    mixed = Spread(z * scales)
    mean = (curve.rate(-1.0 - 2) + curve.rate(-1.0 + 2)) / 2
    assert mixed.bits(-1.0, curve) > mean - 0.2
