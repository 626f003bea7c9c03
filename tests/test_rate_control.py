"""Targets met on real weights, everything counted."""

import contextlib
import tracemalloc

import pytest
import torch
from conftest import IMAGE, VIDEO, fastest, snr_db
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchcodec_weights import CodecTensor, RateError, codec_weight_only

SAMPLED = (*VIDEO, *IMAGE)


@pytest.mark.parametrize("codec", SAMPLED)
@pytest.mark.parametrize("bits", [1.5, 2, 2.5, 3, 4, 6])
def test_bits_of_a_real_weight(codec: str, bits: float, query: Tensor) -> None:
    coded = CodecTensor.from_hp(query, codec_weight_only(codec, bits=bits, preset=fastest(codec)))
    assert bits - 0.03 < coded.bits_per_weight <= bits
    # Everything that is stored, nothing else.
    stored = coded.qdata.numel() + coded.scale.numel() + coded.act_pre_scale.numel()
    assert coded.zero_point is None
    assert coded.bits_per_weight == 8 * stored / query.numel()
    decoded = coded.dequantize()
    assert snr_db(query, decoded) == pytest.approx(coded.header.snr_db, abs=1e-3)
    assert coded.header.snr_db > 6.02 * bits - 6.5


@pytest.mark.parametrize("codec", SAMPLED)
def test_bits_of_a_weight_with_outliers(codec: str, spiky: Tensor) -> None:
    coded = CodecTensor.from_hp(spiky, codec_weight_only(codec, bits=2, preset=fastest(codec)))
    assert 1.97 < coded.bits_per_weight <= 2
    largest = spiky.abs().flatten().topk(5).indices
    assert (coded.dequantize().flatten()[largest] == spiky.flatten()[largest]).all()


@pytest.mark.parametrize("codec", SAMPLED)
def test_snr_of_a_real_weight(codec: str, query: Tensor) -> None:
    config = codec_weight_only(codec, snr_db=15, preset=fastest(codec))
    decoded = CodecTensor.from_hp(query, config).dequantize()
    assert 15 <= snr_db(query, decoded) < 15.2


@settings(max_examples=10, deadline=None)
@given(bits=st.floats(1.4, 6.0))
def test_any_bits(query: Tensor, bits: float) -> None:
    coded = CodecTensor.from_hp(query, codec_weight_only("h264", bits=bits, preset="fast"))
    assert bits - 0.03 < coded.bits_per_weight <= bits


def test_step_is_taken_as_it_is(query: Tensor) -> None:
    fine = CodecTensor.from_hp(query, codec_weight_only("h264", step=0.25))
    coarse = CodecTensor.from_hp(query, codec_weight_only("h264", step=0.5))
    assert fine.header.snr_db - coarse.header.snr_db == pytest.approx(6.0, abs=0.5)


@pytest.mark.parametrize("bits", [0.01, 30.0])
def test_unreachable_bits_name_the_nearest(query: Tensor, bits: float) -> None:
    with pytest.raises(RateError, match=rf"bits={bits:g} cannot be reached.*nearest") as caught:
        CodecTensor.from_hp(query, codec_weight_only("h264", bits=bits, preset="fast"))
    if bits < 1:
        assert 0.01 < caught.value.nearest < 0.2
    else:
        assert 8 < caught.value.nearest < 30


FAST = ("ectcq", "h264", "vp9", "jpeg", "jpeg2000", "htj2k", "jpegxl")


def _weight(kind: str, rows: int, cols: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(rows, cols, generator=generator)
    return noise.sign() if kind == "signs" else noise


@pytest.mark.parametrize("codec", FAST)
@pytest.mark.parametrize(
    ("kind", "shape"), [("noise", (1, 40)), ("noise", (64, 64)), ("signs", (64, 100))]
)
@pytest.mark.parametrize(
    "target",
    [
        *({"bits": bits} for bits in (0.01, 0.1, 0.3, 0.5, 0.8, 14.0, 40.0)),
        *({"snr_db": snr} for snr in (0.01, 0.5, 2.0, 50.0, 200.0)),
        *({"step": step} for step in (1e-9, 1e9)),
    ],
    ids=lambda target: "=".join(map(str, *target.items())),
)
def test_the_nearest_can_be_reached(
    codec: str, kind: str, shape: tuple[int, int], target: dict[str, float]
) -> None:
    weight, (argument,) = _weight(kind, *shape), target
    try:
        CodecTensor.from_hp(weight, codec_weight_only(codec, preset=fastest(codec), **target))  # type: ignore[arg-type]
        return
    except RateError as error:
        nearest, message = error.nearest, str(error)
    again = codec_weight_only(codec, preset=fastest(codec), **{argument: nearest})  # type: ignore[arg-type]
    coded = CodecTensor.from_hp(weight, again)
    if argument == "bits":
        assert coded.bits_per_weight <= nearest
    elif argument == "snr_db":
        assert coded.header.snr_db >= nearest
    assert f"{nearest:.4g}" in message, "what the message says is what can be reached"


@pytest.mark.parametrize("codec", FAST)
@pytest.mark.parametrize("bits", [0.02, 0.3, 0.5, 0.7])
def test_no_rate_is_nearer_than_the_nearest(codec: str, bits: float) -> None:
    weight = _weight("noise", 64, 64)
    rates = []
    for octave in range(-4, 5):
        config = codec_weight_only(codec, step=2.0**octave, preset=fastest(codec))
        with contextlib.suppress(RateError):
            rates.append(CodecTensor.from_hp(weight, config).bits_per_weight)
    config = codec_weight_only(codec, bits=bits, preset=fastest(codec))
    try:
        assert CodecTensor.from_hp(weight, config).bits_per_weight <= bits
        return
    except RateError as error:
        nearest = error.nearest
    assert abs(nearest - bits) <= min(abs(rate - bits) for rate in rates) + 0.03


@pytest.mark.parametrize("bits", [0.002, 0.1])
def test_a_rate_below_all_does_not_take_the_finest_step(bits: float) -> None:
    """libvvenc fails at the finest step that its standard has."""
    config = codec_weight_only("vvc", bits=bits, preset="faster")
    with pytest.raises(RateError, match="cannot be reached") as caught:
        CodecTensor.from_hp(_weight("noise", 64, 64), config)
    again = codec_weight_only("vvc", bits=caught.value.nearest, preset="faster")
    coded = CodecTensor.from_hp(_weight("noise", 64, 64), again)
    assert coded.bits_per_weight <= caught.value.nearest


@pytest.mark.parametrize("target", [{"bits": 9}, {"bits": 24}, {"snr_db": 90}])
def test_a_target_beyond_what_libvvenc_writes(target: dict[str, float]) -> None:
    """FFmpeg gives it room for 8 bits a sample."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RateError, match=r"cannot be reached.*nearest") as caught:
        CodecTensor.from_hp(weight, codec_weight_only("vvc", **target, preset="faster"))
    nearest = caught.value.nearest
    assert (7.5 < nearest < 8.1) if "bits" in target else (35 < nearest < 42)
    again = codec_weight_only("vvc", **dict.fromkeys(target, nearest), preset="faster")
    coded = CodecTensor.from_hp(weight, again)
    assert 7.5 < coded.bits_per_weight <= 8.1


def test_unreachable_step_names_what_is_allowed(query: Tensor) -> None:
    with pytest.raises(RateError, match=r"step=1e-06 cannot be reached.*allowed: \d"):
        CodecTensor.from_hp(query, codec_weight_only("h264", step=1e-6))


def test_absurd_targets_do_not_take_absurd_memory() -> None:
    config = codec_weight_only("ectcq", bits=32)
    tracemalloc.start()
    try:
        with pytest.raises(RateError, match="bits=32 cannot be reached"):
            CodecTensor.from_hp(torch.randn(1, 33), config)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**26
