"""Rate control: finds the step for given bits per weight, or for a given SNR."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from itertools import pairwise
from math import erf, inf, isfinite, log2, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.errors import RateError, StepTooFineError

BITS_TOLERANCE = 0.03
"""The result is in (bits − 0.03, bits] for matrices of `EXACT_WEIGHTS` weights or more."""
EXACT_WEIGHTS = 2**16
SNR_TOLERANCE = 0.2
"""The result is in [snr_db, snr_db + 0.2)."""
DB_PER_BIT = 20 * np.log10(2)

_MAX_ENCODES = 10
_SAME_STEP = 1e-3


@dataclass(frozen=True)
class Target:
    """What to reach: exactly one of bits per weight, step, or SNR in dB."""

    kind: Literal["bits", "step", "snr_db"]
    value: float

    @property
    def accepted(self) -> tuple[float, float]:
        """Lowest and highest result that is accepted."""
        if self.kind == "bits":
            return self.value - BITS_TOLERANCE, self.value
        return self.value, self.value + SNR_TOLERANCE


def search_step(
    measure: Callable[[float], float],
    start: float,
    target: Target,
    slope: float,
    limits: tuple[float, float],
    exact: bool = True,
) -> float:
    """Find log2 of the step at which `measure` meets the target, and measure there.

    Newton's method with a known slope for the first correction, then the secant between the nearest
    results on both sides: usually two encodes, one if `start` was right.

    Args:
        measure: encodes at a log2 step and returns the result; nearly decreasing. Raises
            StepTooFineError if the encoder cannot: then coarser steps are tried.
        start: first log2 step to try.
        slope: derivative of the result at the start, negative.
        limits: finest and coarsest log2 step.
        exact: whether the result must be in `target.accepted`. If not, the best result on the right
            side of the target (at most the bits, at least the SNR) is accepted if there is none in
            the range, as the size of a few weights changes in jumps.

    Raises:
        RateError: no step within the limits was found that gives such a result. Its `nearest` is
            the nearest target that one of the results of the search meets.
        StepTooFineError: the encoder could not encode at any step that was tried.
    """
    low, high = target.accepted
    aim = (low + high) / 2
    finest, coarsest = limits
    tried: dict[float, float] = {}
    too_fine: dict[float, StepTooFineError] = {}

    def measured(x: float) -> float:
        try:
            tried[x] = measure(x)
        except StepTooFineError as error:
            tried[x], too_fine[x] = inf, error  # more than any target, as results decrease
        return tried[x]

    x = float(np.clip(start, finest, coarsest))
    for _ in range(_MAX_ENCODES):
        if any(abs(x - other) < _SAME_STEP for other in tried):
            break  # at a limit, or at a jump of the result
        if _meets(measured(x), target):
            return x
        x = float(np.clip(_next(tried, aim, slope), finest, coarsest))
    # The finest step only if it can help: it takes longest, and libvvenc may fail at it.
    for edge in (coarsest, finest) if max(tried.values()) <= aim else (coarsest,):
        if edge not in tried and _meets(measured(edge), target):
            return edge
    cause = next(iter(too_fine.values()), None)
    if cause and len(too_fine) == len(tried):
        raise cause
    allowed = {
        x: value
        for x, value in tried.items()
        if x not in too_fine and (value <= high if target.kind == "bits" else value >= low)
    }
    if allowed and not exact:
        best = min(allowed, key=lambda x: abs(tried[x] - target.value))
        measure(best)  # again, as the caller keeps the last measurement
        return best
    raise out_of_reach(target, nearest_target(target, tried, limits)) from cause


def out_of_reach(target: Target, nearest: float) -> RateError:
    """The error that names the nearest target that can be reached."""
    return RateError(
        f"{target.kind}={target.value:g} cannot be reached for this matrix with this codec; "
        f"the nearest that can is {f'{nearest:#.4g}'.rstrip('.')}",
        nearest,
    )


def _meets(value: float, target: Target) -> bool:
    low, high = target.accepted
    return low < value <= high or (target.kind == "snr_db" and value == low)


def nearest_target(
    target: Target, results: Mapping[float, float], limits: tuple[float, float]
) -> float:
    """The nearest target that one of the results meets, for a target out of reach.

    A search that fails ends at the limits, so a result there can be reached again. Elsewhere a
    result on the target's wrong side is at a jump, and the next search may end a little beside it.
    Then the target is chosen so that the result is in the middle of its accepted range.

    Args:
        results: bits per weight or SNR by log2 of the step.
        limits: finest and coarsest log2 step.
    """
    low, high = target.accepted
    sign = 1 if target.kind == "bits" else -1
    nearest = []
    for x, value in results.items():
        wrong_side = sign * (value - target.value) > 0
        goal = value + sign * (high - low) / 2 if wrong_side and x not in limits else value
        goal = rounded(goal, up=sign > 0)
        if isfinite(goal) and goal > 0:
            nearest.append(goal)
    return min(nearest, key=lambda goal: abs(goal - target.value), default=target.value)


def rounded(value: float, *, up: bool) -> float:
    """A number rounded up or down to four significant digits, for messages."""
    if not isfinite(value) or value <= 0:
        return value
    unit = Decimal(1).scaleb(Decimal(value).adjusted() - 3)
    return float(Decimal(value).quantize(unit, ROUND_CEILING if up else ROUND_FLOOR))


def _next(tried: dict[float, float], aim: float, slope: float) -> float:
    above = max((x for x, value in tried.items() if value > aim), default=None)
    below = min((x for x, value in tried.items() if value <= aim), default=None)
    if above is not None and below is not None and above < below:
        share = (tried[above] - aim) / (tried[above] - tried[below])
        sides = [value > aim for value in tried.values()]
        if len(set(sides[-3:])) == 1 or not isfinite(share):
            share = 0.5  # the secant creeps up to a jump from one side
        return above + (below - above) * min(max(share, 0.1), 0.9)
    # All results are on one side of the aim: extrapolate from the outermost.
    edge, *others = sorted(tried, reverse=below is None)
    if tried[edge] == inf:
        return inf
    far = 0.0
    if others:
        # A result that changes in jumps may not have changed, or the wrong way: then go further.
        secant = (tried[edge] - tried[others[0]]) / (edge - others[0])
        slope = min(max(secant, 3 * slope), slope / 3)
        far = 2 * abs(edge - others[0]) if len(others) > 1 else 0.0
    distance = max(abs(aim - tried[edge]) / -slope, far)
    return edge + distance if below is None else edge - distance


def entropy_shift(z: NDArray[np.float32], log2_step: float) -> float:
    """Bits per weight that a matrix takes at a step in excess of Gaussian data.

    The difference of the entropies of z and of a unit Gaussian, both rounded to multiples of the
    step. A codec's rate curve shifts by nearly this.
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
