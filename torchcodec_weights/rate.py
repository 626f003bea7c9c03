"""Rate control: which step gives the wanted bits per weight, or the wanted SNR."""

from collections.abc import Callable
from dataclasses import dataclass
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

    @property
    def slope(self) -> float:
        """Change of the result with log2 of the step, about."""
        return -1.0 if self.kind == "bits" else -float(DB_PER_BIT)


def search_step(
    measure: Callable[[float], float],
    start: float,
    target: Target,
    slope: float,
    limits: tuple[float, float],
) -> float:
    """Find log2 of the step at which `measure` falls into the target's window.

    Newton's method with a known slope for the first correction, the secant between the nearest
    results on either side after it: two encodes are the rule, one where `start` was right.

    Args:
        measure: encodes at a log2 step and returns the result; decreasing, nearly.
        start: first log2 step to try.
        slope: derivative of the result at the start, negative.
        limits: finest and coarsest log2 step.

    Raises:
        RateError: no step within the limits gives a result in the window.
    """
    low, high = target.window
    aim = (low + high) / 2
    finest, coarsest = limits
    tried: dict[float, float] = {}
    x = float(np.clip(start, finest, coarsest))
    for _ in range(_MAX_ENCODES):
        if x in tried:
            break
        value = tried[x] = measure(x)
        if low < value <= high or (target.kind == "snr_db" and value == low):
            return x
        x = float(np.clip(_next(tried, aim, slope), finest, coarsest))
    below = [value for value in tried.values() if value <= high]
    nearest = (
        max(below)
        if below and target.kind == "bits"
        else min(tried.values(), key=lambda value: abs(value - target.value))
    )
    raise RateError(
        f"{target.kind}={target.value:g} cannot be reached for this matrix with this codec; "
        f"the nearest that can is {nearest:.3f}",
        nearest,
    )


def _next(tried: dict[float, float], aim: float, slope: float) -> float:
    above = max((x for x, value in tried.items() if value > aim), default=None)
    below = min((x for x, value in tried.items() if value <= aim), default=None)
    if above is not None and below is not None and above < below:
        share = (tried[above] - aim) / (tried[above] - tried[below])
        return above + (below - above) * min(max(share, 0.1), 0.9)
    x = min(tried, key=lambda x: abs(tried[x] - aim))
    return x + (aim - tried[x]) / slope


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
    p = [upper - lower for lower, upper in zip(cdf, cdf[1:], strict=False)]
    return -sum(q * log2(q) for q in p if q > 0)
