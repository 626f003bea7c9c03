"""Bits of layers under one average, by one step for the whole model."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.records import RateCurve
from torchcodec_weights.encoder.spread import Spread

_MOST_ABOVE = 2.0
_MOST_BELOW = 2.0


def allocate(
    spreads: Sequence[Spread],
    overheads: NDArray[np.float64],
    sizes: NDArray[np.int64],
    curve: RateCurve,
    bits: float,
) -> NDArray[np.float64]:
    """The rates that layers have at one common step, at an average rate.

    Args:
        spreads: of each layer's weights, times the square root of their importance.
        overheads: (layers,), bits per weight beside the payload.
        sizes: (layers,), weights of each.
        curve: of the codec.
        bits: average over all weights.

    Returns:
        (layers,), bits per weight, at most two above the average, and at least half of it or two
        below it.
    """
    lowest, highest = max(bits / 2, bits - _MOST_BELOW), bits + _MOST_ABOVE

    def rates(log2_step: float) -> NDArray[np.float64]:
        found = [spread.bits(log2_step, curve) for spread in spreads]
        return np.clip(np.array(found) + overheads, lowest, highest)

    low = min(spread.octaves[0] for spread in spreads) - 32.0
    high = max(spread.octaves[-1] for spread in spreads) + 32.0
    for _ in range(60):
        middle = (low + high) / 2
        too_many = np.average(rates(middle), weights=sizes) > bits
        low, high = (middle, high) if too_many else (low, middle)
    return rates(high)
