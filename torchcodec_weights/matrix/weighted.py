"""W ↔ Z for a weight whose rows and columns differ in importance: steps that follow it.

Z is coded with one step Δ, so the step of weight (i, j) is Δ · scale[i] · act_pre_scale[j]. The
cost of errors at equal bits is least where it is in inverse proportion to √(G_i · D_j): G_i is the
importance of the row, and D_j what an error in the column costs, the diagonal of the moments or,
with error feedback, the conditional variance (matrix/feedback.py). This is reverse water-filling
with weighted distortion (Cover and Thomas, Elements of Information Theory, section 10.3.3). Rates
follow from the variances: Z has small ones where weights matter little.
"""

from dataclasses import replace

import numpy as np

from torchcodec_weights.matrix.normalize import (
    MAX_OUTLIERS,
    FloatArray,
    Normalized,
    decode_scale,
    encode_scale,
)

_WEAKEST = 2.0**-20
"""Least importance of a row or column beside the largest: inputs may reach it that did not when
importance was measured."""


def normalize_weighted(
    w: FloatArray, rows: FloatArray, columns: FloatArray, seed: int, *, even_rows: bool
) -> Normalized:
    """Scale a matrix by importance, with random signs; no outliers, no zero point.

    The scale of a row is the inverse root of its importance; for even rows, the geometric mean of
    that and of its root mean square. Variances then differ less between rows: tables that serve all
    rows fit better, and rows of little importance keep some levels. With all of their weights at
    zero their errors would be as coherent as their outputs, and harm a model more than noise of the
    same energy (studies/calibration.md).

    Args:
        w: float32 (rows, cols), finite.
        rows: float32 (rows,), importance G, 0 or more.
        columns: float32 (cols,), importance D, 0 or more.
        seed: of the random signs.
        even_rows: as `Codec.even_rows`.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    weights = np.square(w, dtype=np.float64)
    row_rms = np.sqrt(weights.mean(axis=1))
    row_rms = np.maximum(row_rms, row_rms.max(initial=0.0) * _WEAKEST)
    row_scale = 1 / np.sqrt(_floored(rows))
    if even_rows:
        row_scale = np.sqrt(row_rms * row_scale)
    col_scale = 1 / np.sqrt(_floored(columns))
    row_codes, row_base = encode_scale(
        row_scale.astype(np.float32), rng.integers(0, 2, len(row_scale), np.uint8)
    )
    col_codes, col_base = encode_scale(
        col_scale.astype(np.float32), rng.integers(0, 2, len(col_scale), np.uint8)
    )
    z = w / decode_scale(row_codes, row_base)[:, None]
    z /= decode_scale(col_codes, col_base)
    rms = float(np.sqrt(np.square(z, dtype=np.float64).mean())) or 1.0
    row_base = float(np.float32(row_base * rms))
    z = w / decode_scale(row_codes, row_base)[:, None]
    z /= decode_scale(col_codes, col_base)
    return Normalized(
        z,
        row_codes,
        col_codes,
        row_base,
        col_base,
        None,
        np.empty(0, np.int64),
        float(np.max(np.abs(z), initial=0.0)),
    )


def take_outliers(norm: Normalized, limit: float) -> Normalized:
    """Make outliers of weights beyond a limit, in units of Z: the largest 0.5 % at most."""
    limit = max(limit, float(np.quantile(np.abs(norm.z), 1 - MAX_OUTLIERS)))
    outliers = np.flatnonzero(np.abs(norm.z) > limit)
    norm.z.reshape(-1)[outliers] = 0
    peak = float(np.max(np.abs(norm.z), initial=0.0))
    return replace(norm, outliers=outliers, peak=peak)


def _floored(importance: FloatArray) -> FloatArray:
    """Importance with a mean of 1, without values so small that scales would differ too far."""
    largest = float(np.max(importance, initial=0.0))
    if largest == 0:
        return np.ones(len(importance), np.float64)
    return np.maximum(importance.astype(np.float64) / largest, _WEAKEST)
