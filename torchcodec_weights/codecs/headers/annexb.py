"""NAL units of a byte stream, H.264, H.265 and H.266 annex B."""

import re

from torchcodec_weights.errors import CodecError

# Zeros, followed by the rest of a start code, by a byte that no unit may hold there, or by the end.
_ZEROS = re.compile(rb"\x00\x00+([\x01\x02]|\Z)?")
_READ = 2048  # bytes; the fields that are read are within so many bytes of a unit


def nal_units(stream: bytes) -> list[bytes]:
    """The NAL units of a stream, with their headers and emulation prevention bytes.

    Raises:
        CodecError: the stream does not begin with a start code, or a unit is empty or holds three
            bytes in a row that no unit may (H.264 clause 7.4.1): decoders take these for its end.
    """
    bounds: list[tuple[int, int]] = []  # of start codes, with the zeros before them
    for zeros in _ZEROS.finditer(stream):
        if zeros[1] == b"\1":
            bounds.append(zeros.span())
        elif zeros[1] == b"\2" or (zeros[1] is None and len(zeros[0]) > 2):
            raise CodecError("video stream has a NAL unit with the end of a unit in it")
    if not bounds or bounds[0][0]:
        raise CodecError("video stream does not begin with a start code")
    ends = [start for start, _ in bounds[1:]] + [len(stream)]
    units = [stream[begin:end].rstrip(b"\0") for (_, begin), end in zip(bounds, ends, strict=True)]
    if min(map(len, units)) < 2:
        raise CodecError("video stream has an empty NAL unit")
    return units


def unescaped(unit: bytes) -> bytes:
    """The beginning of a NAL unit without its emulation prevention bytes."""
    return unit[:_READ].replace(b"\0\0\3", b"\0\0")
