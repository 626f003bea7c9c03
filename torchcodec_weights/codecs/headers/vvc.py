"""H.266: sequence and picture parameter sets, and the slice of one picture."""

from torchcodec_weights.codecs.headers.annexb import nal_units, unescaped
from torchcodec_weights.codecs.headers.fields import Bits, Picture, cropped
from torchcodec_weights.errors import CodecError

# nal_unit_type, table 5.
_IDR_SLICES, _SPS, _PPS = (7, 8), 15, 16
_HARMLESS = (14, 17, 18, 20, 23, 24)  # VPS, APS before and after, delimiter, SEI before and after
_MOST_UNITS = 32  # a decoder keeps a structure of all that each could hold


def read(stream: bytes) -> Picture:
    """The picture of a stream of one IDR picture in one slice.

    Raises:
        CodecError: anything else is in the stream.
    """
    units = nal_units(stream)
    if len(units) > _MOST_UNITS:
        raise CodecError(f"vvc stream has {len(units)} NAL units; at most {_MOST_UNITS} are read")
    found: Picture | None = None
    sizes, slices = set(), 0
    for unit in units:
        kind = unit[1] >> 3
        if unit[0] or unit[1] & 7 != 1:
            raise CodecError("vvc stream has layers")
        if kind in _IDR_SLICES:
            if not unit[2:3] >= b"\x80":  # sh_picture_header_in_slice_header_flag
                raise CodecError("vvc stream has a picture of several slices")
            slices += 1
        elif kind == _SPS:
            picture = _sequence(Bits(unescaped(unit)[2:]))
            if found not in (None, picture):
                raise CodecError("vvc stream has parameter sets of several sizes")
            found = picture
        elif kind == _PPS:
            sizes.add(_picture_size(Bits(unescaped(unit)[2:])))
        elif kind not in _HARMLESS:
            raise CodecError(f"vvc stream has a NAL unit of type {kind}")
    if found is None:
        raise CodecError("video stream has no sequence parameter set")
    if sizes != {(found.coded_width, found.coded_height)}:
        raise CodecError("vvc stream has a picture of another size than its sequence's")
    if slices != 1:
        raise CodecError(f"vvc stream has {slices} pictures")
    return found


def _sequence(bits: Bits) -> Picture:
    """seq_parameter_set_rbsp(), clause 7.3.2.4."""
    bits.read(8)
    if bits.read(3):
        raise CodecError("video stream has temporal layers")
    if bits.read(2) != 1:
        raise CodecError("video stream is not 4:2:0")
    bits.read(2)
    if not bits.read(1):
        raise CodecError("vvc stream has a parameter set without profile")
    # profile_tier_level(), clause 7.3.3.1, of one sublayer.
    bits.read(16)
    bits.read(2)
    if bits.read(1):
        raise CodecError("vvc stream has general constraints")
    bits.align()
    bits.read(32 * bits.read(8))
    bits.read(1)
    if bits.read(1):
        bits.read(1)  # sps_res_change_in_clvs_allowed_flag: picture parameter sets are compared
    width, height = bits.golomb(), bits.golomb()
    crops = (0, 0, 0, 0)
    if bits.read(1):
        crops = bits.golomb(), bits.golomb(), bits.golomb(), bits.golomb()
    if bits.read(1):
        raise CodecError("vvc stream has subpictures")
    return cropped(width, height, crops, (2, 2), 8 + bits.golomb())


def _picture_size(bits: Bits) -> tuple[int, int]:
    """Width and height in pic_parameter_set_rbsp(), clause 7.3.2.5."""
    bits.read(11)
    width, height = bits.golomb(), bits.golomb()
    if bits.read(1):
        raise CodecError("vvc stream has a picture with a window of its own")
    return width, height
