"""JPEG XL: the image header and the header of the only frame of a codestream.

ISO/IEC 18181-1: annex B is the reading of fields, D the image header, F the frame header.
"""

from typing import NamedTuple

from torchcodec_weights.errors import CodecError

_SIGNATURE = b"\xff\x0a"
_LIMIT = 128  # bytes; a header is shorter
# fmt: off
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
# fmt: on
_GRAY = 1
_CUSTOM = 2  # white_point, an enumeration
_SKIP_SMOOTHING = 128  # kSkipAdaptiveLFSmoothing of a frame's flags


class ImageHeader(NamedTuple):
    """Fields of a codestream's image header.

    Attributes:
        height, width: samples.
        depth_position: the bit where two bits begin that choose the depth.
        depth: bits per sample.
        end: bytes up to the first frame.
    """

    height: int
    width: int
    depth_position: int
    depth: int
    end: int


class _Fields:
    """Reads fields, least significant bit first (annex B.2)."""

    def __init__(self, data: bytes | bytearray) -> None:
        self._value = int.from_bytes(data, "little")
        self._size = 8 * len(data)
        self.position = 0

    def u(self, count: int) -> int:
        """An unsigned number of `count` bits."""
        bits = self._value >> self.position & (1 << count) - 1
        self.position += count
        if self.position > self._size:
            raise CodecError("header of a jpegxl stream is cut short")
        return bits

    def u32(self, *choices: tuple[int, int]) -> int:
        """U32(): one of four ranges, each its first number and how many bits are added to it."""
        base, bits = choices[self.u(2)]
        return base + self.u(bits)

    def u64(self) -> int:
        """U64(), its small values."""
        value = self.u32((0, 0), (1, 4), (17, 8), (1 << 62, 0))
        if value >> 62:
            raise CodecError("jpegxl stream has flags that its encoder does not set")
        return value

    def enum(self) -> int:
        """Enum()."""
        return self.u32((0, 0), (1, 0), (2, 4), (18, 6))

    def none(self, count: int, name: str) -> None:
        """Bits that must be zero.

        Raises:
            CodecError: one is not; says that there is a `name`.
        """
        if self.u(count):
            raise CodecError(f"jpegxl stream has {name}")

    def align(self) -> None:
        """Zero bits up to the next byte."""
        self.none(-self.position % 8, "bits between its headers")


def read_image(stream: bytes | bytearray) -> ImageHeader:
    """SizeHeader and ImageMetadata (annex D) of one gray image without anything else.

    Raises:
        CodecError: there is a preview, an animation, another channel, a profile or the like.
    """
    if not stream.startswith(_SIGNATURE):
        raise CodecError("jpegxl stream has no signature")
    fields = _Fields(stream[:_LIMIT])
    fields.u(16)
    small = fields.u(1)

    def side() -> int:
        if small:
            return 8 * (fields.u(5) + 1)
        return 1 + fields.u32((0, 9), (0, 13), (0, 18), (0, 30))

    height = side()
    ratio = fields.u(3)
    if ratio:
        numerator, denominator = _RATIOS[ratio - 1]
        width = height * numerator // denominator
    else:
        width = side()
    fields.none(1, "an image in colour")  # all_default
    fields.none(1, "an orientation, a preview or an animation")
    fields.none(1, "samples in floating point")
    depth_position = fields.position
    depth = fields.u32((8, 0), (10, 0), (12, 0), (1, 6))
    fields.u(1)  # modular_16bit_buffers
    fields.none(2, "extra channels")
    fields.none(1, "an image in XYB")
    fields.none(1, "an image in colour")
    fields.none(1, "a colour profile")
    if fields.enum() != _GRAY:
        raise CodecError("jpegxl stream has an image in colour")
    if fields.enum() == _CUSTOM:
        raise CodecError("jpegxl stream has a white point of its own")
    if fields.u(1):
        fields.u(24)  # gamma
    else:
        fields.enum()
    fields.enum()  # rendering_intent
    fields.none(2, "extensions")
    if not fields.u(1):  # default_m
        raise CodecError("jpegxl stream has transforms of its own")
    fields.align()
    return ImageHeader(height, width, depth_position, depth, fields.position // 8)


def check_frame(stream: bytes, image: ImageHeader) -> None:
    """Reject all but one frame of the image's size, without patches and splines (clause F.2).

    A decoder allocates and computes as much as patches, splines, hidden frames and frames larger
    than the image announce.

    Raises:
        CodecError: it is not the only frame, or has any of these.
    """
    fields = _Fields(stream[image.end : image.end + _LIMIT])
    fields.none(1, "a frame in XYB")  # all_default
    fields.none(2, "a frame that is not shown")
    modular = fields.u(1)
    if fields.u64() not in (0, _SKIP_SMOOTHING):
        raise CodecError("jpegxl stream has noise, patches, splines or a frame at an eighth")
    if fields.u(1):  # do_YCbCr
        fields.none(6, "a subsampled channel")
    fields.none(2, "a frame of another resolution")
    if modular:
        fields.u(2)  # group_size_shift
    fields.none(2, "several passes")
    fields.none(1, "a frame of another size")
    fields.none(2, "a frame that is blended")
    if not fields.u(1):  # is_last
        raise CodecError("jpegxl stream has several frames")
