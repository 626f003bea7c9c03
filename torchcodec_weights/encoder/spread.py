"""Rate of data whose variance differs from weight to weight, from a curve for one variance."""

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.records import RateCurve

_PER_OCTAVE = 16
_LEAST = 2.0**-100


class Spread:
    """How the standard deviations of a matrix's weights spread, by rows and columns.

    That of weight (i, j) is taken as the product of its row's and its column's root mean square
    over that of the matrix.
    """

    def __init__(
        self,
        z: NDArray[np.float32],
        rows: NDArray[np.float32] | float = 1.0,
        columns: NDArray[np.float32] | float = 1.0,
    ) -> None:
        """Measure a matrix (rows, cols), its variances times what rows and columns weigh."""
        squares = np.square(z, dtype=np.float64)
        by_row = np.log2(np.maximum(squares.mean(axis=1) * rows, _LEAST))
        by_column = np.log2(np.maximum(squares.mean(axis=0) * columns, _LEAST))
        mean = np.log2(max(float(squares.mean()), _LEAST))
        cells = np.rint((by_row[:, None] + by_column - mean) / 2 * _PER_OCTAVE).astype(np.int64)
        self.counts = np.bincount((cells - cells.min()).reshape(-1))
        self.octaves = (np.arange(len(self.counts)) + cells.min()) / _PER_OCTAVE

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


def _rates(log2_step: NDArray[np.float64], curve: RateCurve) -> NDArray[np.float64]:
    """Rates of unit variance; beyond the curve's coarsest step they fall exponentially."""
    steps, bits = np.array(curve.log2_step), np.array(curve.bits)
    rates = np.interp(log2_step, steps, bits)
    first = (bits[1] - bits[0]) / (steps[1] - steps[0])
    last = (bits[-1] - bits[-2]) / (steps[-1] - steps[-2])
    rates += np.minimum(log2_step - steps[0], 0) * first
    return rates * np.exp(np.maximum(log2_step - steps[-1], 0) * last / bits[-1])
