"""Rate control, away from any encoder."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchcodec_weights import RateError
from torchcodec_weights.codecs.records import RateCurve
from torchcodec_weights.encoder.rate import (
    BITS_TOLERANCE,
    SNR_TOLERANCE,
    Target,
    rounded,
    search_step,
)
from torchcodec_weights.errors import StepTooFineError


@given(
    st.floats(1.2, 6.0),
    st.floats(-0.3, 0.3),
    st.floats(0.8, 1.2),
    st.floats(-1.5, 1.5),
)
def test_a_smooth_rate_takes_few_encodes(
    bits: float, bend: float, slope: float, offset: float
) -> None:
    tried = []

    def measure(x: float) -> float:
        tried.append(x)
        return 2.0 - slope * x + bend * max(x, 0) ** 2 / 6

    target = Target("bits", bits)
    x = search_step(measure, (2.0 - bits) + 0.2 * offset, target, -1.0, (-6.0, 2.0))
    assert bits - 0.03 < measure(x) <= bits
    assert len(tried) <= 5


def test_a_right_start_takes_one() -> None:
    tried = []

    def measure(x: float) -> float:
        tried.append(x)
        return 2.0 - x

    search_step(measure, 0.01, Target("bits", 2.0), -1.0, (-5.0, 5.0))
    assert tried == [0.01]


def test_unreachable_names_the_nearest() -> None:
    with pytest.raises(RateError, match=r"bits=9 .* nearest that can is 6\.000") as caught:
        search_step(lambda x: 2.0 - x, 0.0, Target("bits", 9.0), -1.0, (-4.0, 2.0))
    assert caught.value.nearest == 6.0


def test_the_nearest_may_lie_beyond_a_jump() -> None:
    """0.51 is nearer to 0.5 than 0.02 is; a target a little above it will do."""
    measure = lambda x: 0.51 - 0.2 * (x - 1.0) if x <= 1.0 else 0.02  # noqa: E731
    with pytest.raises(RateError) as caught:
        search_step(measure, 0.0, Target("bits", 0.5), -1.0, (-4.0, 3.0))
    assert 0.51 <= caught.value.nearest <= 0.51 + BITS_TOLERANCE
    x = search_step(measure, 0.0, Target("bits", caught.value.nearest), -1.0, (-4.0, 3.0))
    assert 0.51 <= measure(x) <= caught.value.nearest


def test_a_plateau_is_crossed() -> None:
    measure = lambda x: 0.51 if x < 2.0 else 0.02  # noqa: E731
    x = search_step(measure, -3.0, Target("bits", 0.04), -1.0, (-4.0, 3.0))
    assert measure(x) == 0.02


@given(st.floats(1e-6, 1e6), st.booleans())
def test_rounded_to_what_can_be_typed(value: float, up: bool) -> None:
    result = rounded(value, up=up)
    assert result >= value if up else result <= value
    assert result == pytest.approx(value, rel=1e-3)
    assert float(f"{result:.4g}") == result


def test_a_rate_in_jumps_takes_the_best_below() -> None:
    last = []

    def measure(x: float) -> float:
        last.append(x)
        return float(round(8 * (2.0 - x))) / 2

    x = search_step(measure, 0.0, Target("bits", 7.9), -4.0, (-5.0, 2.0), exact=False)
    assert measure(x) <= 7.9
    assert last[-2] == x, "the result that is kept must be the last one measured"
    with pytest.raises(RateError):
        search_step(measure, 0.0, Target("bits", 7.9), -4.0, (-5.0, 2.0))


def test_snr_is_met_from_above() -> None:
    x = search_step(lambda x: 12 - 6 * x, 0.5, Target("snr_db", 20.0), -6.02, (-9.0, 2.0))
    assert 20.0 <= 12 - 6 * x < 20.2


def test_rate_curve_inverts() -> None:
    curve = RateCurve((-4.0, -2.0, 0.0, 1.0), (6.0, 4.2, 2.1, 1.0))
    for bits in (0.5, 1.5, 3.0, 5.0, 7.0):
        assert curve.rate(curve.log2_step_for(bits)) == pytest.approx(bits)


@given(st.floats(-3.5, 1.5), st.floats(-4.0, 2.0), st.floats(-3.9, 1.9), st.booleans())
def test_steps_that_are_too_fine(limit: float, start: float, goal: float, snr: bool) -> None:
    """Below a limit an encoder fails: what lies above it is found, whatever was tried first."""

    def measure(x: float) -> float:
        if x < limit:
            raise StepTooFineError("too fine")
        return 6.0 - x

    target = Target("snr_db" if snr else "bits", 6.0 - goal)
    window = SNR_TOLERANCE if snr else BITS_TOLERANCE
    limits = (-4.0, 2.0)
    if goal > limit + window:
        x = search_step(measure, start, target, -1.0, limits)
        assert target.accepted[0] <= measure(x) <= target.accepted[1]
    elif goal < limit - window:
        with pytest.raises(RateError, match="cannot be reached") as caught:
            search_step(measure, start, target, -1.0, limits)
        # Half a window below an SNR that was found, so that a search that ends beside it meets it.
        assert -0.05 - snr * window / 2 < caught.value.nearest - (6.0 - limit) < 0.001
        if snr:
            with pytest.raises(RateError):
                search_step(measure, start, target, -1.0, limits, exact=False)
        else:
            x = search_step(measure, start, target, -1.0, limits, exact=False)
            assert limit <= x < limit + 0.05


def test_an_encoder_that_always_fails_says_why() -> None:
    def measure(x: float) -> float:
        raise StepTooFineError("no room")

    with pytest.raises(StepTooFineError, match="no room"):
        search_step(measure, 0.0, Target("bits", 3.0), -1.0, (-4.0, 2.0))
