"""VP9: the uncompressed header of one key frame."""

from torchcodec_weights.codecs.headers.fields import Bits, Picture
from torchcodec_weights.errors import CodecError


def read(stream: bytes) -> Picture:
    """The picture of a stream of one key frame. VP9 specification, clause 6.2.

    Raises:
        CodecError: anything else is in the stream.
    """
    bits = Bits(stream)
    marker, profile = bits.read(2), bits.read(1) + 2 * bits.read(1)
    if marker != 2 or profile not in (0, 2):
        raise CodecError("video stream is not 4:2:0")
    shown, other = bits.read(1), bits.read(1)
    bits.read(2)
    if shown or other or bits.read(24) != 0x498342:
        raise CodecError("video stream does not begin with a key frame")
    depth = 8 if profile == 0 else 10 + 2 * bits.read(1)
    if bits.read(3) == 7:
        raise CodecError("video stream is not 4:2:0")
    bits.read(1)
    width, height = bits.read(16) + 1, bits.read(16) + 1
    # The last byte of an index of frames (annex B); encoders let no single frame end like that.
    if stream[-1] & 0xE0 == 0xC0:
        raise CodecError("vp9 stream has several frames")
    return Picture(width, height, width, height, depth)
