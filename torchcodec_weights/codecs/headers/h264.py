"""H.264: sequence parameter sets, and slices of one picture."""

from torchcodec_weights.codecs.headers.annexb import nal_units, unescaped
from torchcodec_weights.codecs.headers.fields import Bits, Picture, cropped
from torchcodec_weights.errors import CodecError

# nal_unit_type, table 7-1.
_IDR_SLICE, _SPS = 5, 7
_HARMLESS = (6, 8, 9, 12)  # SEI, picture parameter set, delimiter, filler
_UNITS_BUT_SLICES = 32  # as in HEVC, where x265 writes at most 16
_WITH_CHROMA = (100, 110, 122, 244, 44, 83, 86, 118, 128)


def read(stream: bytes) -> Picture:
    """The picture of a stream of one IDR picture, in any number of slices.

    Raises:
        CodecError: anything else is in the stream.
    """
    found: Picture | None = None
    others, next_macroblock = 0, 0
    for unit in nal_units(stream):
        kind = unit[0] & 31
        if kind == _IDR_SLICE:
            # Rising addresses bound the slices, and tell this picture's from another's.
            first = Bits(unescaped(unit)[1:]).golomb()
            if first < next_macroblock or (first > 0) != (next_macroblock > 0):
                raise CodecError("h264 stream has several pictures, or slices out of order")
            next_macroblock = first + 1
            continue
        others += 1
        if kind == _SPS:
            picture = _parameter_set(Bits(unescaped(unit)[1:]))
            if found not in (None, picture):
                raise CodecError("h264 stream has parameter sets of several sizes")
            found = picture
        elif kind not in _HARMLESS:
            raise CodecError(f"h264 stream has a NAL unit of type {kind}")
    if found is None:
        raise CodecError("video stream has no sequence parameter set")
    if others > _UNITS_BUT_SLICES:
        raise CodecError(f"h264 stream has {others} NAL units besides its slices")
    if not next_macroblock:
        raise CodecError("h264 stream has no picture")
    return found


def _parameter_set(bits: Bits) -> Picture:
    """seq_parameter_set_data(), clause 7.3.2.1.1."""
    profile = bits.read(8)
    bits.read(16)
    bits.golomb()
    depth = 8
    if profile in _WITH_CHROMA:
        if bits.golomb() != 1:
            raise CodecError("video stream is not 4:2:0")
        depth += bits.golomb()
        bits.golomb()
        bits.read(1)
        if bits.read(1):
            for index in range(8):
                if bits.read(1):
                    _skip_scaling_list(bits, 16 if index < 6 else 64)
    bits.golomb()
    order = bits.golomb()
    if order == 1:
        raise CodecError("video stream has a picture order count of type 1")
    if order == 0:
        bits.golomb()
    bits.golomb()
    bits.read(1)
    width, height = 16 * (bits.golomb() + 1), 16 * (bits.golomb() + 1)
    frames_only = bits.read(1)
    if not frames_only:
        height *= 2
        bits.read(1)
    bits.read(1)
    crops = (0, 0, 0, 0)
    if bits.read(1):
        crops = bits.golomb(), bits.golomb(), bits.golomb(), bits.golomb()
    return cropped(width, height, crops, (2, 2 if frames_only else 4), depth)


def _skip_scaling_list(bits: Bits, size: int) -> None:
    """scaling_list(), clause 7.3.2.1.1.1."""
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.signed_golomb()) % 256
        last = following or last
