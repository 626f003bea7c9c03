"""Payloads of pictures that were made to lie, with checksums that are right."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from conftest import IMAGE, VIDEO

from torchcodec_weights import CodecError
from torchcodec_weights.codecs.headers.annexb import nal_units
from torchcodec_weights.codecs.pictures import SampleCodec
from torchcodec_weights.codecs.records import EncoderSettings
from torchcodec_weights.codecs.registry import get_codec

TILE = (64, 256)
LARGE = (1024, 2048)


def sampled(name: str) -> SampleCodec:
    codec = get_codec(name)
    assert isinstance(codec, SampleCodec)
    return codec


def payload_of(
    name: str, shape: tuple[int, int] = TILE, settings: EncoderSettings | None = None
) -> bytes:
    tile = np.random.default_rng(0).standard_normal(shape, np.float32).clip(-4.5, 4.5)
    settings = settings or EncoderSettings(next(iter(get_codec(name).presets), None))
    step = max(1.0, get_codec(name).step_range(4.5, settings)[0])
    return get_codec(name).encode(tile, step, 4.5, b"", settings).payload


def decode(name: str, payload: bytes, shape: tuple[int, int] = TILE) -> None:
    sampled(name).decode(payload, 1.0, b"", shape, np.empty(shape, np.float32))


def units(stream: bytes) -> list[bytes]:
    """NAL units with their start codes."""
    return re.split(rb"(?<=[^\x00])(?=\x00{2,3}\x01)", stream)


def kind_of(name: str, unit: bytes) -> int:
    """Type of a NAL unit with its start code."""
    header = unit[unit.index(b"\1") + 1 :]
    return {"h264": header[0] & 31, "hevc": header[0] >> 1, "vvc": header[1] >> 3}[name]


SPS = {"h264": 7, "hevc": 33, "vvc": 15}


def spliced(name: str, kind: int, *, keep: bool) -> bytes:
    """A small stream with a parameter set of a large one after, or in place of, its own."""
    large = [unit for unit in units(payload_of(name, LARGE)) if kind_of(name, unit) == kind]
    parts = []
    for unit in units(payload_of(name)):
        own = kind_of(name, unit) == kind
        parts += ([unit] if keep or not own else []) + (large if own else [])
    return b"".join(parts)


def superframe(frames: list[bytes]) -> bytes:
    """Frames with their index, VP9 annex B."""
    marker = bytes([0xC0 | 3 << 3 | len(frames) - 1])
    sizes = b"".join(len(frame).to_bytes(4, "little") for frame in frames)
    return b"".join(frames) + marker + sizes + marker


def hidden_segment() -> bytes:
    """A JPEG whose picture is large to decoders, and small to who takes RST0 for a segment.

    A decoder skips RST0, reads the large SOF0, and skips COM with the small one in it.
    """
    payload = payload_of("jpeg")
    start = payload.index(b"\xff\xc0")
    small, rest = payload[start : start + 13], payload[start + 13 :]
    large = small[:5] + b"\xff\xf8\xff\xf8" + small[9:]
    hidden = large + b"\xff\xfe" + (2 + len(small)).to_bytes(2, "big")
    lie = b"\xff\xd0" + (2 + len(hidden)).to_bytes(2, "big") + hidden
    return payload[:start] + lie + small + rest


def inserted(marker: bytes, before: bytes) -> bytes:
    """A JPEG with bytes before one of its markers."""
    payload = payload_of("jpeg")
    start = payload.index(before)
    return payload[:start] + marker + payload[start:]


def animation() -> bytes:
    frames = np.random.default_rng(0).integers(0, 256, (40, 64, 256, 1), np.uint8)
    return bytes(imagecodecs.jpegxl_encode(frames, lossless=True, usecontainer=False, effort=1))


def restated(payload: bytes, **fields: int) -> bytes:
    """A JPEG 2000 stream with other values of SOT's fields."""
    start = payload.index(b"\xff\x90\0\x0a")
    places = {"tile": (4, 2), "length": (6, 4), "part": (10, 1), "parts": (11, 1)}
    data = bytearray(payload)
    for field, value in fields.items():
        place, size = places[field]
        data[start + place : start + place + size] = value.to_bytes(size, "big")
    return bytes(data)


HOSTILE: dict[str, tuple[str, Callable[[], bytes], str]] = {
    **{
        f"{name}-large": (name, lambda name=name: payload_of(name, LARGE), "too many for a tile")
        for name in (*VIDEO, *IMAGE)
    },
    **{
        f"{name}-small": (name, lambda name=name: payload_of(name, (8, 8)), "too few for a tile")
        for name in (*VIDEO, *IMAGE)
    },
    **{
        f"{name}-repeated": (name, lambda name=name: payload_of(name) * 300, "stream has|does not")
        for name in ("h264", "hevc", "vvc", "av1", "jpeg")
    },
    **{
        f"{name}-twice": (name, lambda name=name: payload_of(name) * 2, "several|2 pictures")
        for name in ("h264", "hevc", "vvc", "av1")
    },
    **{
        f"{name}-second-sps": (
            name,
            lambda name=name: spliced(name, SPS[name], keep=True),
            "parameter sets of several sizes",
        )
        for name in SPS
    },
    "vvc-large-pps": ("vvc", lambda: spliced("vvc", 16, keep=False), "of another size"),
    "vvc-second-pps": ("vvc", lambda: spliced("vvc", 16, keep=True), "of another size"),
    "vp9-superframe": ("vp9", lambda: superframe([payload_of("vp9")] * 8), "several frames"),
    "vp9-large-hidden": (
        "vp9",
        lambda: superframe([payload_of("vp9"), payload_of("vp9", LARGE)]),
        "several frames",
    ),
    "jpeg-hidden-segment": ("jpeg", hidden_segment, "other segments"),
    "jpeg-fill": ("jpeg", lambda: inserted(b"\xff", b"\xff\xc0"), "other segments"),
    "jpeg-comment": ("jpeg", lambda: inserted(b"\xff\xfe\0\2", b"\xff\xda"), "other segments"),
    "jpeg-restart": ("jpeg", lambda: inserted(b"\xff\xd0", b"\xff\xd9"), "data of its scan"),
    "jpeg-lines": (
        "jpeg",
        lambda: inserted(b"\xff\xdc\0\4\xff\xff", b"\xff\xd9"),
        "data of its scan",
    ),
    "jpegxl-animation": ("jpegxl", animation, "jpegxl stream has"),
    **{
        f"{name}-{field}": (
            name,
            lambda name=name, field=field, value=value: restated(
                payload_of(name), **{field: value}
            ),
            "tile-part",
        )
        for name in ("jpeg2000", "htj2k")
        for field, value in (("tile", 1), ("length", 0), ("part", 1), ("parts", 2))
    },
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refused_before_a_decoder_runs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, make, message = HOSTILE[case]
    payload = make()
    codec = sampled(name)

    def decoder(payload: bytes) -> None:
        raise AssertionError("the decoder was asked")

    monkeypatch.setattr(codec, "decode_frame", decoder)
    with pytest.raises(CodecError, match=message):
        decode(name, payload)


_MEASURED = """
import resource, sys
from pathlib import Path
import numpy as np
from torchcodec_weights import CodecError
from torchcodec_weights.codecs.registry import get_codec

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def decode(path):
    codec = get_codec(path.stem.partition("-")[0])
    codec.decode(path.read_bytes(), 1.0, b"", (64, 256), np.empty((64, 256), np.float32))

folder = Path(sys.argv[1])
for path in sorted(folder.glob("*.good")):
    decode(path)
before = peak()
for path in sorted(folder.glob("*.bad")):
    try:
        decode(path)
    except CodecError:
        pass
    else:
        sys.exit(f"{path.stem} was decoded")
    if peak() - before > 64:
        sys.exit(f"{path.stem} took {peak() - before:.0f} MB")
"""


def test_refusing_takes_no_memory(tmp_path: Path) -> None:
    for name in (*VIDEO, *IMAGE):
        (tmp_path / f"{name}.good").write_bytes(payload_of(name))
    for case, (_, make, _) in HOSTILE.items():
        (tmp_path / f"{case}.bad").write_bytes(make())
    command = [sys.executable, "-c", _MEASURED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", VIDEO)
def test_a_decoder_that_finds_more_than_was_announced_fails(name: str) -> None:
    """Were a header misread, the decoder's own limit would hold."""
    from torchcodec_weights.codecs.video import ffmpeg
    from torchcodec_weights.codecs.video.base import VideoCodec

    codec = sampled(name)
    assert isinstance(codec, VideoCodec)
    payload = payload_of(name, LARGE)
    with pytest.raises(CodecError, match=codec.decoder):
        ffmpeg.decode_luma(codec.decoder, payload, TILE)
    frame, _ = ffmpeg.decode_luma(codec.decoder, payload, LARGE)
    assert frame.shape == LARGE


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"\0\0\1ab", [b"ab"]),
        (b"\0\0\0\0\1ab\0\0\0\0\1cd\0", [b"ab", b"cd"]),
        (b"\0\0\1ab\0\0\0", [b"ab"]),
        (b"\0\0\1ab\0\0\3\1c", [b"ab\0\0\3\1c"]),
        (b"", "start code"),
        (b"ab\0\0\1cd", "start code"),
        (b"\0\0\1\0\0\1ab", "an empty NAL unit"),
        (b"\0\0\1ab\0\0\2c", "the end of a unit in it"),
        (b"\0\0\1ab\0\0\0c", "the end of a unit in it"),
        (b"\0\0\1" + b"\0" * 10**6 + b"a", "the end of a unit in it"),
    ],
)
def test_nal_units_end_where_a_decoder_ends_them(
    stream: bytes, expected: list[bytes] | str
) -> None:
    if isinstance(expected, str):
        with pytest.raises(CodecError, match=expected):
            nal_units(stream)
    else:
        assert nal_units(stream) == expected


SHAPES = ((1, 33), (5, 7), (32, 32), (2, 4096), (7, 999), (3, 14336), (96, 200), (130, 520))


@pytest.mark.parametrize(
    ("name", "preset", "depth"),
    [
        (name, preset, depth)
        for name in (*VIDEO, *IMAGE)
        for preset in get_codec(name).presets or (None,)
        for depth in get_codec(name).bit_depths or (None,)
    ],
)
def test_all_that_encoders_write_is_read(name: str, preset: str | None, depth: int | None) -> None:
    settings = EncoderSettings(preset, bit_depth=depth)
    slow = preset in ("slow", "slower", "veryslow")
    for number, shape in enumerate(SHAPES[:3] if slow else SHAPES):
        tile = np.random.default_rng(number).standard_normal(shape, np.float32).clip(-4.5, 4.5)
        finest = get_codec(name).step_range(4.5, settings)[0]
        for step in (max(0.1, finest), 2.0) if number % 2 else (1.0,):
            payload = get_codec(name).encode(tile, step, 4.5, b"", settings).payload
            decode(name, payload, shape)
    blank = get_codec(name).encode(np.zeros((40, 72), np.float32), 0.5, 4.5, b"", settings)
    decode(name, blank.payload, (40, 72))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("vvc", {"decodedpicturehash": "1"}),
        ("vvc", {"ctusize": "64"}),
        ("vvc", {"profile": "main_10_still_picture"}),
        ("hevc", {"aud": "1", "hash": "1", "info": "1"}),
        ("hevc", {"scaling-list": "default", "ctu": "64"}),
        ("h264", {"slices": "8"}),
        ("h264", {"slice-max-size": "300"}),
        ("h264", {"aud": "1", "interlaced": "1"}),
        ("h264", {"cqm": "jvt", "8x8dct": "1"}),
        ("av1", {"tile-columns": "2", "tile-rows": "2"}),
        ("av1", {"avif": "1"}),
        ("av1", {"sframe-dist": "1"}),
        ("av1", {"scm": "1"}),
        ("av1", {"mastering-display": "G(0.2,0.3)B(0.1,0.1)R(0.4,0.4)WP(0.3,0.3)L(1000,0.1)"}),
        ("vp9", {"tile-columns": "2", "error-resilient": "1"}),
    ],
)
def test_raw_parameters_that_change_the_stream(name: str, params: dict[str, str]) -> None:
    settings = EncoderSettings(encoder_params=params)
    plain = payload_of(name, (256, 512), EncoderSettings())
    payload = payload_of(name, (256, 512), settings)
    assert payload != plain
    decode(name, payload, (256, 512))


def test_a_short_run_of_the_fuzzer_finds_nothing(tmp_path: Path) -> None:
    program = Path(__file__).parent / "fuzz_pictures.py"
    command = [sys.executable, str(program), "--seconds", "10", "--corpus", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.fullmatch(
        r"(\d+) inputs tried, (\d+) refused, (\d+) decoded, 0 findings, \d+ seconds\n", done.stdout
    )
    assert found, done.stdout
    assert min(map(int, found.groups())) > 20
