"""Rate control: which step gives the wanted bits per weight, or the wanted SNR."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import erf, log2, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.base import RateError

BITS_WINDOW = 0.03
"""A result lies in (bits − 0.03, bits] for matrices of `EXACT_WEIGHTS` weights or more."""
EXACT_WEIGHTS = 2**16
SNR_WINDOW = 0.2
"""A result lies in [snr_db, snr_db + 0.2)."""
DB_PER_BIT = 20 * np.log10(2)

_MAX_ENCODES = 10
_SAME_STEP = 1e-3


@dataclass(frozen=True)
class Target:
    """What to reach: exactly one of bits per weight, step, or SNR in dB."""

    kind: Literal["bits", "step", "snr_db"]
    value: float

    @property
    def window(self) -> tuple[float, float]:
        """Lowest and highest result that is accepted."""
        if self.kind == "bits":
            return self.value - BITS_WINDOW, self.value
        return self.value, self.value + SNR_WINDOW


def search_step(
    measure: Callable[[float], float],
    start: float,
    target: Target,
    slope: float,
    limits: tuple[float, float],
    exact: bool = True,
) -> float:
    """Find log2 of the step at which `measure` falls into the target's window, and measure there.

    Newton's method with a known slope for the first correction, the secant between the nearest
    results on either side after it: two encodes are the rule, one where `start` was right.

    Args:
        measure: encodes at a log2 step and returns the result; decreasing, nearly.
        start: first log2 step to try.
        slope: derivative of the result at the start, negative.
        limits: finest and coarsest log2 step.
        exact: whether only the window will do. If not, the best result on its right side will (at
            most the bits, at least the SNR): what few weights take moves in jumps.

    Raises:
        RateError: no step within the limits gives such a result.
    """
    low, high = target.window
    aim = (low + high) / 2
    finest, coarsest = limits
    tried: dict[float, float] = {}
    x = float(np.clip(start, finest, coarsest))
    for _ in range(_MAX_ENCODES):
        if any(abs(x - other) < _SAME_STEP for other in tried):
            break  # at a limit, or at a jump of the result
        value = tried[x] = measure(x)
        if low < value <= high or (target.kind == "snr_db" and value == low):
            return x
        x = float(np.clip(_next(tried, aim, slope), finest, coarsest))
    allowed = {
        x: value
        for x, value in tried.items()
        if (value <= high if target.kind == "bits" else value >= low)
    }
    best = min(allowed or tried, key=lambda x: abs(tried[x] - target.value))
    if allowed and not exact:
        if best != x:
            measure(best)
        return best
    raise RateError(
        f"{target.kind}={target.value:g} cannot be reached for this matrix with this codec; "
        f"the nearest that can is {tried[best]:.3f}",
        tried[best],
    )


def _next(tried: dict[float, float], aim: float, slope: float) -> float:
    above = max((x for x, value in tried.items() if value > aim), default=None)
    below = min((x for x, value in tried.items() if value <= aim), default=None)
    if above is not None and below is not None and above < below:
        share = (tried[above] - aim) / (tried[above] - tried[below])
        return above + (below - above) * min(max(share, 0.1), 0.9)
    # All results lie on one side: go on beyond the last in that direction.
    edge, *others = sorted(tried, reverse=below is None)
    if others:
        # A result that moves in jumps may not have moved at all, or back: then go further.
        secant = (tried[edge] - tried[others[0]]) / (edge - others[0])
        slope = min(max(secant, 3 * slope), slope / 3)
    return edge + (aim - tried[edge]) / slope


def entropy_shift(z: NDArray[np.float32], log2_step: float) -> float:
    """How many bits per weight more than Gaussian data a matrix takes at a step.

    The difference of the entropies of z and of a unit Gaussian, both rounded to multiples of the
    step: the rate curve of a codec moves by nearly as much.
    """
    step = 2.0**log2_step
    sample = z.reshape(-1)
    sample = sample[:: max(1, sample.size // 2**18)]
    levels = np.rint(sample / np.float32(step)).astype(np.int64)
    counts = np.bincount(levels - levels.min())
    p = counts[counts > 0] / len(levels)
    # The first-order bias of the plug-in estimate (Miller, 1955).
    bias = (len(p) - 1) / (2 * len(levels) * np.log(2))
    return float(-(p * np.log2(p)).sum() + bias) - _gaussian_entropy(step)


def _gaussian_entropy(step: float) -> float:
    edge = int(6 / step) + 1
    cdf = [0.5 * (1 + erf((k - 0.5) * step / sqrt(2))) for k in range(-edge, edge + 2)]
    p = [upper - lower for lower, upper in pairwise(cdf)]
    return -sum(q * log2(q) for q in p if q > 0)
