"""Rate control, away from any encoder."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchcodec_weights import RateError
from torchcodec_weights.codecs.base import RateCurve
from torchcodec_weights.rate import Target, search_step


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
