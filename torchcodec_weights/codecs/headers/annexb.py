"""NAL units of a byte stream, H.264, H.265 and H.266 annex B."""

from torchcodec_weights.codecs.base import CodecError

_START_CODE = b"\0\0\1"
# A decoder takes these for the end of a unit, H.264 clause 7.4.1.
_FORBIDDEN = (b"\0\0\0", b"\0\0\2")
_READ = 2048  # bytes of a unit that surely hold what is read of it


def nal_units(stream: bytes) -> list[bytes]:
    """The NAL units of a stream, with their headers and emulation prevention bytes.

    Raises:
        CodecError: the stream does not begin with a start code, or a unit is empty or holds three
            bytes in a row that no unit may.
    """
    first, *parts = stream.split(_START_CODE)
    if not parts or first.strip(b"\0"):
        raise CodecError("video stream does not begin with a start code")
    units = [part.rstrip(b"\0") for part in parts]
    for unit in units:
        if len(unit) < 2:
            raise CodecError("video stream has an empty NAL unit")
        if any(code in unit for code in _FORBIDDEN):
            raise CodecError("video stream has a NAL unit with the end of a unit in it")
    return units


def unescaped(unit: bytes) -> bytes:
    """The beginning of a NAL unit without its emulation prevention bytes."""
    return unit[:_READ].replace(b"\0\0\3", b"\0\0")
