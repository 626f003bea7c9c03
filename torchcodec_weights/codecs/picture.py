"""What the headers of a video stream say of its picture: size and bit depth, without decoding it.

Decoders in hardware are made for one size and depth, and take no others; these must be known first.
Only what our encoders write is read: 4:2:0, one picture. Anything else is a CodecError.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from torchcodec_weights.codecs.base import CodecError


class Picture(NamedTuple):
    """Size and depth of a stream's picture.

    Attributes:
        width, height: of the luma samples that a decoder returns.
        coded_width, coded_height: with the margin that is coded but cut off.
        depth: bits per sample.
    """

    width: int
    height: int
    coded_width: int
    coded_height: int
    depth: int


class _Bits:
    """Reads a header, most significant bit first."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "big")
        self._left = 8 * len(data)

    def read(self, count: int) -> int:
        """An unsigned number of `count` bits."""
        self._left -= count
        if self._left < 0:
            raise CodecError("header of a video stream is cut short")
        return self._value >> self._left & (1 << count) - 1

    def golomb(self) -> int:
        """ue(v): an unsigned Exp-Golomb code, H.264 and H.265 clause 9."""
        zeros = 0
        while not self.read(1):
            zeros += 1
        return (1 << zeros) - 1 + self.read(zeros)


_START_CODE = re.compile(rb"\x00\x00\x01")
_HEADER = 128  # bytes that surely hold the part of a header that is read
_EXPECTED_420 = "video stream is not 4:2:0"


def _parameter_set(stream: bytes, wanted: Callable[[int], bool], skip: int) -> _Bits:
    """The first NAL unit of whose first byte `wanted` says so, without `skip` bytes of header."""
    for match in _START_CODE.finditer(stream):
        start = match.end()
        if start < len(stream) and wanted(stream[start]):
            unit = stream[start + skip : start + skip + _HEADER]
            return _Bits(unit.replace(b"\x00\x00\x03", b"\x00\x00"))
    raise CodecError("video stream has no sequence parameter set")


def _hevc(stream: bytes) -> Picture:
    """H.265 clause 7.3.2.2.1."""
    bits = _parameter_set(stream, lambda first: first >> 1 == 33, 2)
    bits.read(4)
    if bits.read(3):
        raise CodecError("video stream has temporal layers")
    bits.read(1 + 96)  # temporal_id_nesting_flag, profile_tier_level
    bits.golomb()
    if bits.golomb() != 1:
        raise CodecError(_EXPECTED_420)
    width, height = bits.golomb(), bits.golomb()
    crops = [bits.golomb() for _ in range(4)] if bits.read(1) else [0, 0, 0, 0]
    depth = 8 + bits.golomb()
    left, right, top, bottom = (2 * crop for crop in crops)
    return Picture(width - left - right, height - top - bottom, width, height, depth)


_H264_WITH_CHROMA = (100, 110, 122, 244, 44, 83, 86, 118, 128)


def _h264(stream: bytes) -> Picture:
    """H.264 clause 7.3.2.1.1."""
    bits = _parameter_set(stream, lambda first: first & 31 == 7, 1)
    profile = bits.read(8)
    bits.read(16)
    bits.golomb()
    depth = 8
    if profile in _H264_WITH_CHROMA:
        if bits.golomb() != 1:
            raise CodecError(_EXPECTED_420)
        depth += bits.golomb()
        bits.golomb()
        if bits.read(2):
            raise CodecError("video stream has scaling matrices or a lossless transform")
    bits.golomb()
    order = bits.golomb()
    if order == 1:
        raise CodecError("video stream has a picture order count of type 1")
    if order == 0:
        bits.golomb()
    bits.golomb()
    bits.read(1)
    width, height = 16 * (bits.golomb() + 1), 16 * (bits.golomb() + 1)
    if not bits.read(1):
        raise CodecError("video stream is interlaced")
    bits.read(1)
    crops = [bits.golomb() for _ in range(4)] if bits.read(1) else [0, 0, 0, 0]
    left, right, top, bottom = (2 * crop for crop in crops)
    return Picture(width - left - right, height - top - bottom, width, height, depth)


def _vp9(stream: bytes) -> Picture:
    """VP9 specification, clause 6.2."""
    bits = _Bits(stream[:_HEADER])
    marker, profile = bits.read(2), bits.read(1) + 2 * bits.read(1)
    if marker != 2 or profile not in (0, 2):
        raise CodecError(_EXPECTED_420)
    shown, other = bits.read(1), bits.read(1)
    bits.read(2)
    if shown or other or bits.read(24) != 0x498342:
        raise CodecError("video stream does not begin with a key frame")
    depth = 8 if profile == 0 else 10 + 2 * bits.read(1)
    if bits.read(3) == 7:
        raise CodecError(_EXPECTED_420)
    bits.read(1)
    width, height = bits.read(16) + 1, bits.read(16) + 1
    return Picture(width, height, width, height, depth)


def _av1(stream: bytes) -> Picture:
    """AV1 specification, clauses 5.3 and 5.5."""
    position = 0
    while position < len(stream):
        first = stream[position]
        position += 2 if first >> 2 & 1 else 1
        size = 0
        for shift in range(0, 56, 7):
            if position >= len(stream):
                break
            byte = stream[position]
            position += 1
            size |= (byte & 127) << shift
            if not byte & 128:
                break
        if not first >> 1 & 1:
            break
        if first >> 3 & 15 == 1:
            return _av1_sequence(_Bits(stream[position : position + min(size, _HEADER)]))
        position += size
    raise CodecError("video stream has no sequence header")


def _av1_sequence(bits: _Bits) -> Picture:
    profile = bits.read(3)
    bits.read(1)
    reduced = bits.read(1)
    if reduced:
        bits.read(5)
    else:
        if bits.read(1):
            raise CodecError("video stream has timing information")
        delays = bits.read(1)
        for _ in range(bits.read(5) + 1):
            bits.read(12)
            if bits.read(5) > 7:
                bits.read(1)
            if delays and bits.read(1):
                bits.read(4)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    width, height = bits.read(width_bits) + 1, bits.read(height_bits) + 1
    if not reduced and bits.read(1):
        bits.read(7)
    bits.read(3)
    if not reduced:
        bits.read(4)
        ordered = bits.read(1)
        if ordered:
            bits.read(2)
        # seq_choose_screen_content_tools, seq_choose_integer_mv
        screen = 2 if bits.read(1) else bits.read(1)
        if screen > 0 and not bits.read(1):
            bits.read(1)
        if ordered:
            bits.read(3)
    bits.read(3)
    deep = bits.read(1)
    if profile != 0:
        raise CodecError(_EXPECTED_420)
    return Picture(width, height, width, height, 10 if deep else 8)


_READERS = {"hevc": _hevc, "h264": _h264, "vp9": _vp9, "av1": _av1}


def read_picture(codec: str, stream: bytes) -> Picture:
    """Size and depth of the picture of a stream.

    Args:
        codec: "hevc", "h264", "vp9" or "av1".

    Raises:
        CodecError: the headers are not such as our encoders write.
    """
    return _READERS[codec](stream)
