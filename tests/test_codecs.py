"""Each codec by itself: real encoders, real streams, no container."""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import IMAGE, VIDEO
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torchcodec_weights import CodecError, CodecUnavailableError, available_codecs
from torchcodec_weights.codecs import registry
from torchcodec_weights.codecs.names import BUILT_IN
from torchcodec_weights.codecs.pictures import SampleCodec
from torchcodec_weights.codecs.records import EncoderSettings
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.codecs.video import ffmpeg

SAMPLED = (*VIDEO, *IMAGE)
PRESETS = [
    (name, preset)
    for name in SAMPLED
    for preset in get_codec(name).presets or (None,)
    if preset not in ("slow", "slower", "veryslow")
]


def code(
    name: str, tile: np.ndarray, step: float, settings: EncoderSettings
) -> tuple[bytes, np.ndarray]:
    codec = get_codec(name)
    coded = codec.encode(tile, step, float(np.abs(tile).max()), b"", settings)
    out = np.empty_like(tile)
    codec.decode(coded.payload, coded.unit, b"", tile.shape, out)
    return coded.payload, out


@pytest.fixture(scope="module")
def gaussian() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((256, 256), np.float32)


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_rate_and_distortion_follow_the_step(
    name: str, preset: str | None, gaussian: np.ndarray
) -> None:
    settings = EncoderSettings(preset)
    curve = get_codec(name).rate_curve(settings)
    for log2_step in (-2.0, 0.0):
        payload, out = code(name, gaussian, 2.0**log2_step, settings)
        rate = 8 * len(payload) / gaussian.size
        assert rate == pytest.approx(curve.rate(log2_step), abs=0.12)
        snr = -10 * np.log10(np.mean((out - gaussian) ** 2))
        # Between the rate–distortion function and four to five decibels above it.
        assert 6.02 * rate - (4.7 if name == "htj2k" else 4.0) < snr < 6.02 * rate


@pytest.mark.parametrize("name", VIDEO)
@pytest.mark.parametrize("depth", [8, 10])
def test_bit_depths(name: str, depth: int, gaussian: np.ndarray) -> None:
    if depth not in get_codec(name).bit_depths:
        with pytest.raises(ValueError, match=f"bit_depth={depth} with codec '{name}': allowed"):
            get_codec(name).validate(EncoderSettings(bit_depth=depth))
        return
    payload, out = code(name, gaussian, 0.25, EncoderSettings(bit_depth=depth))
    assert np.sqrt(np.mean((out - gaussian) ** 2)) < 0.1
    codec = get_codec(name)
    assert isinstance(codec, SampleCodec)
    assert codec.decode_frame(payload)[1] == depth


@pytest.mark.parametrize("name", SAMPLED)
@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 90), cols=st.integers(1, 90), seed=st.integers(0, 9))
def test_any_shape(name: str, rows: int, cols: int, seed: int) -> None:
    assume(rows * cols >= 32)  # fewer are never handed to a codec of samples
    tile = np.random.default_rng(seed).standard_normal((rows, cols), np.float32)
    _, out = code(name, tile, 0.1, EncoderSettings())
    # The largest error of a transform codec at this step, a single weight in gray included.
    assert np.abs(out - tile).max() < 0.8


@pytest.mark.parametrize("name", SAMPLED)
# OpenJPH fails inside a function of imagecodecs that cannot raise.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_streams_end_in_a_result_or_an_error(name: str, gaussian: np.ndarray) -> None:
    codec = get_codec(name)
    tile = gaussian[:64]
    coded = codec.encode(tile, 0.5, 6.0, b"", EncoderSettings())
    out = np.empty_like(tile)
    rng = np.random.default_rng(1)
    errors = 0
    for trial in range(40):
        data = bytearray(coded.payload)
        if trial % 2:
            data = data[: rng.integers(0, len(data))]
        else:
            for position in rng.integers(0, len(data), 1 + trial):
                data[position] = rng.integers(0, 256)
        try:
            codec.decode(bytes(data), coded.unit, b"", tile.shape, out)
        except CodecError:
            errors += 1
    assert errors > 0


@pytest.mark.parametrize("name", SAMPLED)
def test_a_stream_of_another_size_is_an_error(name: str, gaussian: np.ndarray) -> None:
    codec = get_codec(name)
    small = codec.encode(gaussian[:8, :8].copy(), 0.5, 6.0, b"", EncoderSettings())
    with pytest.raises(CodecError, match="too few for a tile of 256x256"):
        codec.decode(small.payload, small.unit, b"", gaussian.shape, np.empty_like(gaussian))


@pytest.mark.parametrize("name", VIDEO)
def test_raw_parameters_reach_the_encoder(name: str, gaussian: np.ndarray) -> None:
    changed = {
        "vvc": {"depquant": "0", "signhideflag": "1"},
        "hevc": {"signhide": "0"},
        "h264": {"cabac": "0"},
        "av1": {"enable-cdef": "1", "sharpness": "7"},
        "vp9": {"sharpness": "7", "cpu-used": "8"},
    }[name]
    plain, _ = code(name, gaussian, 0.5, EncoderSettings())
    other, _ = code(name, gaussian, 0.5, EncoderSettings(encoder_params=changed))
    assert plain != other


def test_a_parameter_that_the_encoder_refuses_is_an_error(gaussian: np.ndarray) -> None:
    settings = EncoderSettings(encoder_params={"no_such_parameter": "1"})
    with pytest.raises(CodecError, match="libvvenc failed with status"):
        code("vvc", gaussian, 0.5, settings)


@pytest.mark.parametrize("name", ["h264", "vvc"])
def test_streams_carry_no_needless_units(name: str, gaussian: np.ndarray) -> None:
    payload, _ = code(name, gaussian, 0.5, EncoderSettings())
    assert b"x264" not in payload
    assert b"\x00\x00\x01\x00\xa1" not in payload


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="needs Linux")
@pytest.mark.parametrize("name", VIDEO)
def test_encoders_leave_scheduling_alone(
    name: str, gaussian: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SVT-AV1 makes threads real-time where it runs as root, the caller's too."""

    def policies() -> set[int]:
        tasks = Path("/proc/self/task").iterdir()
        return {os.sched_getscheduler(int(task.name)) for task in tasks}

    seen = []
    make_frame = ffmpeg._av_frame
    monkeypatch.setattr(
        ffmpeg, "_av_frame", lambda *args: (seen.append(policies()), make_frame(*args))[1]
    )
    before = policies()
    code(name, gaussian, 0.3, EncoderSettings())
    assert seen or name == "vvc"  # whose encoder is another process
    assert all(found == before for found in (*seen, policies()))


def test_all_codecs_are_available_here() -> None:
    infos = {info.name: info for info in available_codecs()}
    assert list(infos) == ["ectcq", *SAMPLED, "lossless"]
    for info in infos.values():
        assert info.encoder
        assert "cpu" in info.decoders
        assert info.missing is None
        assert info.lossy == (info.name != "lossless")


def test_missing_pyav_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffmpeg, "pyav", lambda: None)
    info = get_codec("hevc").info()
    assert info.encoder is None
    assert not info.decoders
    assert "pip install av" in str(info.missing)
    with pytest.raises(CodecUnavailableError, match=r"'hevc' is not available.*pip install av"):
        get_codec("hevc").require(encoder=False)


def test_missing_program_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffmpeg, "program", lambda: None)
    info = get_codec("vvc").info()
    assert info.encoder is None
    assert "cpu" in info.decoders
    with pytest.raises(CodecUnavailableError, match="pip install imageio-ffmpeg"):
        get_codec("vvc").require(encoder=True)
    get_codec("vvc").require(encoder=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (EncoderSettings(preset="best"), "preset='best' with codec 'vvc': allowed: 'faster'"),
        (EncoderSettings(profile="low-delay"), "profile='low-delay' .*allowed: 'all-intra'"),
        (EncoderSettings(bit_depth=12), "bit_depth=12 .*allowed: 10"),
    ],
)
def test_unknown_settings_name_what_is_allowed(settings: EncoderSettings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_codec("vvc").validate(settings)


def test_every_codec_has_the_name_that_it_is_known_by() -> None:
    assert tuple(registry._BUILT_IN) == BUILT_IN
    assert all(codec.name == name for name, codec in registry._BUILT_IN.items())


def test_unknown_codec_names_the_known() -> None:
    with pytest.raises(
        ValueError, match=r"codec='mpeg2' is not a known codec; known: 'ectcq', 'vvc'"
    ):
        get_codec("mpeg2")
