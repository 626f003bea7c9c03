"""What the image codecs write is standard, and what they read may be anything."""

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import av
import imagecodecs
import numpy as np
import pytest
from conftest import IMAGE
from PIL import Image

from torchcodec_weights import CodecError, CodecUnavailableError
from torchcodec_weights.codecs.headers import jpegxl
from torchcodec_weights.codecs.image import base as image
from torchcodec_weights.codecs.pictures import SampleCodec
from torchcodec_weights.codecs.records import EncoderSettings
from torchcodec_weights.codecs.registry import get_codec

STEPS = (0.06, 0.3, 1.0, 3.0)


@pytest.fixture(scope="module")
def gaussian() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((128, 256), np.float32)


def sampled(name: str) -> SampleCodec:
    codec = get_codec(name)
    assert isinstance(codec, SampleCodec)
    return codec


def encoded(
    name: str, tile: np.ndarray, step: float, settings: EncoderSettings | None = None
) -> bytes:
    peak = float(np.abs(tile).max())
    return get_codec(name).encode(tile, step, peak, b"", settings or EncoderSettings()).payload


def by_pillow(payload: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(payload)))


def by_pyav(decoder: str, payload: bytes) -> np.ndarray:
    context: Any = av.CodecContext.create(decoder, "r")  # of a video codec
    frames: list[Any] = [*context.decode(av.Packet(payload)), *context.decode(None)]
    (frame,) = frames
    return frame.to_ndarray()


@pytest.mark.parametrize("step", STEPS)
def test_jpeg_opens_elsewhere(step: float, gaussian: np.ndarray) -> None:
    payload = encoded("jpeg", gaussian, step)
    frame = sampled("jpeg").decode_frame(payload)[0] >> 4
    assert (by_pillow(payload) == frame).all()
    # FFmpeg has an inverse DCT of its own, with other rounding.
    assert np.abs(by_pyav("mjpeg", payload).astype(int) - frame).max() <= 1


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("bit_depth", [8, 16])
def test_jpeg2000_opens_elsewhere(step: float, bit_depth: int, gaussian: np.ndarray) -> None:
    payload = encoded("jpeg2000", gaussian, step, EncoderSettings(bit_depth=bit_depth))
    frame, depth = sampled("jpeg2000").decode_frame(payload)
    assert depth == bit_depth
    assert (by_pillow(payload) == frame).all()
    assert (by_pyav("jpeg2000", payload) == frame).all()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("bit_depth", [8, 16])
def test_htj2k_opens_elsewhere(step: float, bit_depth: int, gaussian: np.ndarray) -> None:
    payload = encoded("htj2k", gaussian, step, EncoderSettings(bit_depth=bit_depth))
    frame, depth = sampled("htj2k").decode_frame(payload)
    assert depth == bit_depth
    for picture in (
        by_pillow(payload),
        by_pyav("jpeg2000", payload),
        imagecodecs.jpeg2k_decode(payload),
        imagecodecs.htj2k_decode(payload),
    ):
        assert (picture[::2, ::2] == frame).all()


@pytest.mark.parametrize("preset", ["fast", "medium"])
def test_jpegxl_is_a_bare_codestream(preset: str, gaussian: np.ndarray) -> None:
    payload = encoded("jpegxl", gaussian, 0.5, EncoderSettings(preset))
    assert payload.startswith(b"\xff\x0a")
    bits = 12 if preset == "fast" else 8
    assert imagecodecs.jpegxl_decode(payload).max() < 2**bits
    assert sampled("jpegxl").decode_frame(payload)[1] == bits


def test_jpeg_finds_every_level(gaussian: np.ndarray) -> None:
    """The quantizer is ours, so the error is that of uniform rounding of the coefficients."""
    codec = get_codec("jpeg")
    for step in (0.2, 0.5, 1.0, 2.0):
        coded = codec.encode(gaussian, step, 5.0, b"", EncoderSettings())
        out = np.empty_like(gaussian)
        codec.decode(coded.payload, coded.unit, b"", gaussian.shape, out)
        # Rounding adds noise of step²/12, of which the Wiener gain takes its share.
        expected = 1 / (1 + 12 / step**2)
        assert np.mean((out - gaussian) ** 2) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("name", IMAGE)
def test_streams_carry_no_needless_segments(name: str, gaussian: np.ndarray) -> None:
    payload = encoded(name, gaussian, 0.5)
    for needless in (b"JFIF", b"OpenJPEG", b"OpenJPH", b"ftyp", b"jbrd"):
        assert needless not in payload
    blank = get_codec(name).encode(np.zeros((32, 32), np.float32), 0.5, 1.0, b"", EncoderSettings())
    # A JPEG's tables take 150 bytes.
    assert len(blank.payload) < 180


@pytest.mark.parametrize("name", IMAGE)
def test_threads_decode_the_same(name: str, gaussian: np.ndarray) -> None:
    codec = get_codec(name)
    tiles = [gaussian * scale for scale in (0.5, 0.8, 1.0, 1.2)]
    coded = [codec.encode(tile, 0.5, 6.0, b"", EncoderSettings()) for tile in tiles]

    def decode(index: int) -> np.ndarray:
        out = np.empty_like(gaussian)
        codec.decode(coded[index].payload, coded[index].unit, b"", gaussian.shape, out)
        return out

    alone = [decode(index) for index in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for index, out in enumerate(pool.map(decode, [0, 1, 2, 3] * 20)):
            assert (out == alone[index % 4]).all()


_FUZZ = """
import sys
import numpy as np
from torchcodec_weights import CodecError
from torchcodec_weights.codecs.records import EncoderSettings
from torchcodec_weights.codecs.registry import get_codec
for name in sys.argv[1:]:
    codec, rng = get_codec(name), np.random.default_rng(7)
    tile = rng.standard_normal((64, 256), np.float32)
    coded = [codec.encode(tile, step, 5.0, b"", EncoderSettings()) for step in (0.1, 0.5, 2.0)]
    out, errors = np.empty_like(tile), 0
    for trial in range(600):
        data = bytearray(coded[trial % 3].payload)
        if trial % 4 == 0:
            del data[rng.integers(0, len(data)) :]
        elif trial % 4 == 1:
            for position in rng.integers(0, len(data), rng.integers(1, 40)):
                data[position] = rng.integers(0, 256)
        else:
            for position in rng.integers(0, 140, trial % 4):
                data[position] ^= 1 << rng.integers(0, 8)
        try:
            codec.decode(bytes(data), 1.0, b"", tile.shape, out)
        except CodecError:
            errors += 1
    assert errors > 100, (name, errors)
"""


def test_damaged_streams_crash_nothing() -> None:
    """In a process of its own, as a library that crashes would take pytest with it."""
    command = [sys.executable, "-c", _FUZZ, *IMAGE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", IMAGE)
def test_a_header_of_gigabytes_is_refused(name: str, gaussian: np.ndarray) -> None:
    payload = bytearray(encoded(name, gaussian, 0.5))
    if name == "jpeg":
        start = payload.index(b"\xff\xc0") + 5
        payload[start : start + 4] = b"\xff\xf8\xff\xf8"
    elif name == "jpegxl":
        end = jpegxl.read_image(payload).end
        # After the signature and the SizeHeader of 128 x 256; the last bit is one.
        metadata = int.from_bytes(payload[:end], "little") >> 25
        size = (1 << 30) - 1 << 3 | 3 << 1 | 1 << 33
        header = 0x0AFF | size << 16 | metadata << 52
        payload[:end] = header.to_bytes(-(-header.bit_length() // 8), "little")
    else:
        for start in (8, 24):
            payload[start : start + 8] = bytes.fromhex("0000fff80000fff8")
    with pytest.raises(CodecError, match="too many for a tile of 128x256"):
        get_codec(name).decode(bytes(payload), 1.0, b"", gaussian.shape, np.empty_like(gaussian))


def test_missing_imagecodecs_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, gaussian: np.ndarray
) -> None:
    monkeypatch.setattr(image, "imagecodecs", lambda: None)
    for name in IMAGE:
        info = get_codec(name).info()
        assert info.encoder is None
        assert not info.decoders
        with pytest.raises(CodecUnavailableError, match=r"pip install 'torchcodec-weights\[image"):
            get_codec(name).require(encoder=True)
    with pytest.raises(CodecUnavailableError, match="imagecodecs is not installed"):
        encoded("jpeg2000", gaussian, 0.5)


def test_raw_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"encoder_params=.*'jpeg': allowed: nothing"):
        get_codec("jpeg").validate(EncoderSettings(encoder_params={"quality": "3"}))
