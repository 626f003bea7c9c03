"""H.265: sequence parameter sets, and slice segments of one picture."""

from torchcodec_weights.codecs.headers.annexb import nal_units, unescaped
from torchcodec_weights.codecs.headers.fields import Bits, Picture, cropped
from torchcodec_weights.errors import CodecError

# nal_unit_type, table 7-1.
_IDR_SLICES, _SPS = (19, 20), 33
_HARMLESS = (32, 34, 35, 39, 40)  # VPS, picture parameter set, delimiter, SEI before and after
# x265 writes no more than 16. A decoder keeps a structure for each, and may decode the rest of the
# picture for each slice.
_MOST_UNITS = 32


def read(stream: bytes) -> Picture:
    """The picture of a stream of one IDR picture, in a few slices.

    Raises:
        CodecError: anything else is in the stream.
    """
    units = nal_units(stream)
    if len(units) > _MOST_UNITS:
        raise CodecError(f"hevc stream has {len(units)} NAL units; at most {_MOST_UNITS} are read")
    found: Picture | None = None
    slices = 0
    for unit in units:
        kind = unit[0] >> 1
        if (unit[0] & 1) << 8 | unit[1] != 1:
            raise CodecError("hevc stream has layers")
        if kind in _IDR_SLICES:
            if unit[2:3] >= b"\x80" and slices:  # first_slice_segment_in_pic_flag
                raise CodecError("hevc stream has several pictures")
            slices += 1
        elif kind == _SPS:
            picture = _parameter_set(Bits(unescaped(unit)[2:]))
            if found not in (None, picture):
                raise CodecError("hevc stream has parameter sets of several sizes")
            found = picture
        elif kind not in _HARMLESS:
            raise CodecError(f"hevc stream has a NAL unit of type {kind}")
    if found is None:
        raise CodecError("video stream has no sequence parameter set")
    if not slices:
        raise CodecError("hevc stream has no picture")
    return found


def _parameter_set(bits: Bits) -> Picture:
    """seq_parameter_set_rbsp(), clause 7.3.2.2.1."""
    bits.read(4)
    if bits.read(3):
        raise CodecError("video stream has temporal layers")
    bits.read(1 + 96)  # temporal_id_nesting_flag, profile_tier_level
    bits.golomb()
    if bits.golomb() != 1:
        raise CodecError("video stream is not 4:2:0")
    width, height = bits.golomb(), bits.golomb()
    crops = (0, 0, 0, 0)
    if bits.read(1):
        crops = bits.golomb(), bits.golomb(), bits.golomb(), bits.golomb()
    return cropped(width, height, crops, (2, 2), 8 + bits.golomb())
