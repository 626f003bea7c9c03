"""Bits of layers under one average, by one step for the whole model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchcodec_weights.codecs.base import Codec
from torchcodec_weights.codecs.records import EncoderSettings, RateCurve
from torchcodec_weights.encoder.prepare import column_costs
from torchcodec_weights.encoder.spread import Spread
from torchcodec_weights.matrix.importance import Importance

_MOST_ABOVE = 2.0
_MOST_BELOW = 2.0


@dataclass(frozen=True)
class Demand:
    """What says which rate a layer has at a step.

    Attributes:
        spread: of its weights, times the square root of their importance.
        overhead: bits per weight beside the payload.
        size: number of its weights.
    """

    spread: Spread
    overhead: float
    size: int


def demand_of(
    weight: Tensor, importance: Importance, codec: Codec, settings: EncoderSettings
) -> Demand:
    """A layer's demand.

    Args:
        weight: of two dimensions or more, taken as a matrix of the first by the others.
        importance: of this matrix.
        codec, settings: that it is to be encoded with.
    """
    dense = weight.detach().float().cpu().numpy().reshape(len(weight), -1)
    costs = column_costs(importance, codec, settings)
    overhead = 8 * sum(dense.shape) / dense.size
    return Demand(Spread(dense, importance.rows, costs), overhead, dense.size)


def allocate(demands: Sequence[Demand], curve: RateCurve, bits: float) -> NDArray[np.float64]:
    """The rates that layers have at one common step, at an average rate.

    Args:
        demands: of the layers.
        curve: of the codec.
        bits: average over all weights.

    Returns:
        (layers,), bits per weight, at most two above the average, and at least half of it or two
        below it.
    """
    spreads = [demand.spread for demand in demands]
    overheads = np.array([demand.overhead for demand in demands])
    sizes = np.array([demand.size for demand in demands])
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
