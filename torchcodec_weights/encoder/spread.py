"""Rate of data whose variance differs from weight to weight, from a curve for one variance."""

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.records import RateCurve

_PER_OCTAVE = 16
_LEAST = 2.0**-100
_BAND = 2**20
"""Weights that are looked at at once: their squares and logarithms take 24 bytes each."""


class Spread:
    """How the standard deviations of a matrix's weights spread, by rows and columns.

    That of weight (i, j) is taken as the product of its row's and its column's root mean square
    over that of the matrix.

    Attributes:
        counts: int64, weights of each sixteenth of an octave.
        first: the first of these, in sixteenths of octaves.
        octaves: float64, base-2 logarithms of their standard deviations.
    """

    def __init__(
        self,
        z: NDArray[np.float32],
        rows: NDArray[np.float32] | float = 1.0,
        columns: NDArray[np.float32] | float = 1.0,
    ) -> None:
        """Measure a matrix (rows, cols), its variances times what rows and columns weigh."""
        means, sums = np.empty(len(z)), np.zeros(z.shape[1])
        bands = _bands(z)
        for band in bands:
            squares = np.square(z[band], dtype=np.float64)
            means[band] = squares.mean(axis=1)
            sums += squares.sum(axis=0)
        by_row = np.log2(np.maximum(means * rows, _LEAST))
        by_column = np.log2(np.maximum(sums / len(z) * columns, _LEAST))
        mean = np.log2(max(float(means.mean()), _LEAST))

        def cells(row_logs: NDArray[np.float64], logs: NDArray[np.float64]) -> NDArray[np.int64]:
            rounded = np.rint((row_logs[:, None] + logs - mean) / 2 * _PER_OCTAVE)
            return rounded.astype(np.int64).reshape(-1)

        ends = cells(np.sort(by_row)[[0, -1]], np.sort(by_column)[[0, -1]])
        counts = np.zeros(ends[-1] - ends[0] + 1, np.int64)
        for band in bands:
            counts += np.bincount(cells(by_row[band], by_column) - ends[0], minlength=len(counts))
        self._hold(counts, int(ends[0]))

    @classmethod
    def of(cls, counts: NDArray[np.int64], first: int) -> "Spread":
        """One that was measured before, from its attributes."""
        spread = cls.__new__(cls)
        spread._hold(counts, first)
        return spread

    def _hold(self, counts: NDArray[np.int64], first: int) -> None:
        self.counts, self.first = counts, first
        self.octaves = (np.arange(len(counts)) + first) / _PER_OCTAVE

    def bits(self, log2_step: float, curve: RateCurve) -> float:
        """Bits per weight at a step."""
        rates = _rates(log2_step - self.octaves, curve)
        return float(np.average(rates, weights=self.counts))

    def log2_step_for(self, bits: float, curve: RateCurve) -> float:
        """The inverse of `bits`."""
        low, high = self.octaves[0] - 32.0, self.octaves[-1] + 32.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.bits(middle, curve) > bits else (low, middle)
        return low


def _bands(z: NDArray[np.float32]) -> list[slice]:
    count = max(1, _BAND // z.shape[1])
    return [slice(first, first + count) for first in range(0, len(z), count)]


def _rates(log2_step: NDArray[np.float64], curve: RateCurve) -> NDArray[np.float64]:
    """Rates of unit variance; beyond the curve's coarsest step they fall exponentially."""
    steps, bits = np.array(curve.log2_step), np.array(curve.bits)
    rates = np.interp(log2_step, steps, bits)
    first = (bits[1] - bits[0]) / (steps[1] - steps[0])
    last = (bits[-1] - bits[-2]) / (steps[-1] - steps[-2])
    rates += np.minimum(log2_step - steps[0], 0) * first
    return rates * np.exp(np.maximum(log2_step - steps[-1], 0) * last / bits[-1])
