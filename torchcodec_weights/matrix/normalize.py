"""W ↔ Z: scales of rows and columns with random signs, row offsets, and outliers kept aside.

    W = diag(scale) · Z · diag(act_pre_scale) + zero_point

Z has nearly unit variance in every row and column; studies/normalization.md shows what that is
worth. Random signs of rows and columns turn the structure that is left into noise. Without them the
codecs' errors follow that structure, and a model suffers more from them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

SCALE_RESOLUTION = 8
"""Scale codes per octave: a scale is off by 4.4 % at most, which the step of Z absorbs (the scaled
weight is divided by the scale as stored, so nothing but the normalization is inexact)."""

SIGN_SEED = 0x7C0DEC
"""Seed of the generator (PCG64) that draws the random signs of rows and columns."""

_MAX_CODE = 127
MAX_OUTLIERS = 0.005
"""Largest share of a matrix that is stored exactly."""
LEAST_GAIN = 1.5
"""Bits that a vector's scale must save to be stored. Vectors of independent Gaussian weights of one
variance seem to save 1 / (2 ln 2) = 0.72 by chance. Above that a scale is worth it even where it
takes more bits than it saves, as errors of some columns harm a model more than errors of others
(studies/normalization.md)."""

_BLOCK = 2**22
"""Weights for which intermediate results are held at once. Large matrices leave little memory."""
_MIN_VECTOR = 32  # shorter rows or columns share one scale: 8 bits each would be too dear


@dataclass(frozen=True)
class Normalized:
    """A matrix ready for a codec.

    Attributes:
        z: float32 (rows, cols), zero where outliers were taken out.
        scale, act_pre_scale: uint8 (rows,) and (cols,), codes of signed scales, see `decode_scale`;
            (1,) where one scale serves all rows or columns.
        row_base, col_base: magnitude of the largest code.
        zero_point: float32 (rows,) added to each row, or None.
        outliers: int64, row-major positions of the weights taken out, increasing.
        peak: bound on |z|.
    """

    z: FloatArray
    scale: NDArray[np.uint8]
    act_pre_scale: NDArray[np.uint8]
    row_base: float
    col_base: float
    zero_point: FloatArray | None
    outliers: NDArray[np.int64]
    peak: float

    @property
    def row_scale(self) -> FloatArray:
        """Scale of each row, float32 (rows,)."""
        return np.resize(decode_scale(self.scale, self.row_base), self.z.shape[0])

    @property
    def col_scale(self) -> FloatArray:
        """Scale of each column, float32 (cols,)."""
        return np.resize(decode_scale(self.act_pre_scale, self.col_base), self.z.shape[1])


CodedScale = tuple[NDArray[np.uint8], float]
"""Codes of scales and their base, as `decode_scale` takes them."""

Equalized = tuple[FloatArray, CodedScale, CodedScale]
"""Z, and the scales of its rows and columns."""


def normalize(
    w: FloatArray,
    threshold: float | None,
    seed: int = SIGN_SEED,
    *,
    equalize: Callable[[FloatArray, float | None, int], Equalized] | None = None,
    row_offsets: Callable[[FloatArray], FloatArray | None] | None = None,
    again: Callable[[], FloatArray] | None = None,
) -> Normalized:
    """Normalize a matrix.

    Args:
        w: float32 (rows, cols), finite.
        threshold: weights beyond this many standard deviations after normalization become
            outliers; None for none. If more than 0.5 % would, the matrix is heavy-tailed, not
            dotted with outliers: then all weights count in the scales, and the largest 0.5 % at
            most become outliers. All of fewer than 32 weights do.
        seed: of the random signs, 0 or more. Decoding does not need it: the scales hold the signs.
        equalize: takes W, the threshold and the seed; returns Z with its rows' and columns' scales.
            May write to W. By default `equalized`.
        row_offsets: takes W; returns what is taken out of each row, float32 (rows,), or None. By
            default `row_means`.
        again: returns W once more. If it is given, Z takes the place of `w`, so that a large matrix
            is in memory once.
    """
    equalize = equalize or equalized
    zero_point = (row_offsets or row_means)(w)
    centered, exponent = _centered(w if again else w.copy(), zero_point)
    again = again or w.copy
    z, rows, cols = equalize(centered, threshold, seed)
    outliers = np.empty(0, np.int64)
    if threshold is not None:
        most = max(1, MAX_OUTLIERS * z.size)
        if len(_beyond(z, threshold)) > most:
            del centered, z
            z, rows, cols = equalize(_centered(again(), zero_point)[0], None, seed)
            quantile = np.quantile(np.abs(z), 1 - MAX_OUTLIERS, overwrite_input=True)
            threshold = max(threshold, float(quantile))
        # So few weights take fewer bytes than the headers of an empty stream.
        outliers = np.arange(z.size) if z.size < _MIN_VECTOR else _beyond(z, threshold)
        z.reshape(-1)[outliers] = 0
    return Normalized(
        z,
        rows[0],
        cols[0],
        float(np.float32(rows[1] * exponent)),
        cols[1],
        zero_point,
        outliers,
        _largest(z),
    )


def _centered(w: FloatArray, zero_point: FloatArray | None) -> tuple[FloatArray, float]:
    """W without row offsets, divided in place by its largest magnitude; and that magnitude."""
    before = _largest(w)
    if zero_point is not None:
        w -= zero_point[:, None]
    # Tiny or huge weights must not under- or overflow in the squares.
    exponent = _largest(w)
    if exponent <= 2.0**-22 * before:
        w[:] = 0  # nothing is left but the rounding of the row means
    else:
        w /= np.float32(exponent)
    return w, exponent


def _largest(z: FloatArray) -> float:
    """Largest magnitude, without an array of magnitudes."""
    return float(max(np.max(z, initial=0.0), -np.min(z, initial=0.0)))


def _beyond(z: FloatArray, threshold: float) -> NDArray[np.int64]:
    """Row-major positions of weights of a magnitude above a threshold, increasing."""
    flat = z.reshape(-1)
    found = [
        np.flatnonzero(np.abs(flat[start : start + _BLOCK]) > threshold) + start
        for start in range(0, flat.size, _BLOCK)
    ]
    return np.concatenate(found)


def equalized(w: FloatArray, threshold: float | None, seed: int) -> Equalized:
    """Divide rows, then columns, by scales with random signs, in place; see `robust_rms`."""
    rng = np.random.Generator(np.random.PCG64(seed))
    rows = _scale(w, threshold, rng, axis=1)
    w /= decode_scale(*rows)[:, None]
    cols = _scale(w, threshold, rng, axis=0)
    w /= decode_scale(*cols)
    return w, rows, cols


def _scale(
    z: FloatArray, threshold: float | None, rng: np.random.Generator, axis: int
) -> CodedScale:
    """One scale for each vector along `axis`; one for all if they are short or do not differ."""
    length = z.shape[axis]
    rms = robust_rms(z, threshold, axis)
    if length < _MIN_VECTOR or coding_gain(rms, length) < LEAST_GAIN * len(rms):
        rms = robust_rms(z.reshape(1, -1), threshold, 1)
    return encode_scale(rms, rng.integers(0, 2, len(rms), np.uint8))


def coding_gain(rms: FloatArray, length: int) -> float:
    """Bits that a scale for each vector saves over one scale for all.

    Args:
        rms: float32 (vectors,), root mean squares.
        length: weights of each vector.
    """
    squares = np.maximum(np.square(rms, dtype=np.float64), 2.0**-280)
    return float(length * np.sum(np.log2(np.mean(squares)) - np.log2(squares)) / 2)


def denormalize(z: FloatArray, row_scale: FloatArray, col_scale: FloatArray) -> None:
    """Apply scales in place: z (n, cols), row_scale (n or 1,), col_scale (cols or 1,)."""
    z *= row_scale[:, None]
    z *= col_scale[None, :]


def encode_scale(rms: FloatArray, signs: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], float]:
    """Code scales on a logarithmic grid of 8 to the octave below the largest.

    Returns:
        uint8 codes (sign in the top bit) and the base, the largest magnitude as float32. Scales
        more than 127/8 octaves below the base are coded as the smallest: such a row or column is
        65,536 times weaker than the strongest and vanishes beside it.
    """
    base = float(np.float32(np.max(rms, initial=0.0))) or 1.0
    with np.errstate(divide="ignore"):
        octaves = np.log2(rms.astype(np.float64) / base)
    codes = np.clip(np.rint(_MAX_CODE + SCALE_RESOLUTION * octaves), 0, _MAX_CODE)
    return codes.astype(np.uint8) | (signs << 7).astype(np.uint8), base


def decode_scale(codes: NDArray[np.uint8], base: float) -> FloatArray:
    """Scales of codes: ± base · 2^(((code & 127) − 127) / 8), float32."""
    return _scale_table(base)[codes]


@lru_cache(maxsize=1024)
def _scale_table(base: float) -> FloatArray:
    octaves = (np.arange(_MAX_CODE + 1) - _MAX_CODE) / SCALE_RESOLUTION
    magnitudes = (np.exp2(octaves) * base).astype(np.float32)
    return np.concatenate([magnitudes, -magnitudes])


def row_means(w: FloatArray) -> FloatArray | None:
    """Means of rows, if taking them out saves more bits than they take (32 each)."""
    means = w.mean(axis=1, dtype=np.float64)
    energy = float(np.einsum("ij,ij->", w, w, dtype=np.float64))
    if energy == 0:
        return None
    rest = max(energy - w.shape[1] * float(means @ means), energy * 2.0**-48)
    saved = 0.5 * np.log2(energy / rest) * w.size
    return means.astype(np.float32) if saved > 32 * len(means) else None


def robust_rms(z: FloatArray, threshold: float | None, axis: int) -> FloatArray:
    """Root mean square along `axis`, not counting the few that will become outliers.

    A weight at 170 standard deviations would otherwise coarsen the steps of its whole row. A vector
    with more than 1 % of its weights beyond the threshold is heavy-tailed: then all of them count.
    """
    rows, cols = z.shape
    if axis == 1 and rows > 1:
        size = max(1, _BLOCK // cols)
        parts = [_robust_rms([z[i : i + size]], threshold, axis) for i in range(0, rows, size)]
        return np.concatenate(parts)
    size = max(1, _BLOCK // z.shape[1 - axis])
    starts = range(0, z.shape[axis], size)
    blocks = [z[i : i + size] if axis == 0 else z[:, i : i + size] for i in starts]
    return _robust_rms(blocks, threshold, axis)


def _robust_rms(blocks: Sequence[FloatArray], threshold: float | None, axis: int) -> FloatArray:
    """`robust_rms` of a matrix in blocks that follow each other along `axis`."""
    count = sum(block.shape[axis] for block in blocks)
    # An outlier among next to nothing may be so far out that its square overflows.
    far = max(map(_largest, blocks)) > 2.0**60
    dtype: type[np.floating[Any]] = np.float64 if far else np.float32

    def squares() -> Iterator[NDArray[Any]]:
        for block in blocks:
            yield np.square(block, dtype=dtype)

    mean = sum(np.sum(s, axis=axis, dtype=np.float64) for s in squares()) / count
    if threshold is None:
        return np.sqrt(mean).astype(np.float32)
    robust = mean.copy()
    for _ in range(3):
        limit = np.expand_dims(robust * threshold**2, axis).astype(dtype)
        kept, total = np.zeros(mean.shape, np.int64), np.zeros(mean.shape)
        for s in squares():
            inside = s <= limit
            kept += inside.sum(axis=axis)
            total += np.sum(s, axis=axis, where=inside, dtype=np.float64)
        trimmed = total / np.maximum(kept, 1)
        robust = np.where(count - kept <= max(1, 0.01 * count), trimmed, mean)
    return np.sqrt(robust).astype(np.float32)
