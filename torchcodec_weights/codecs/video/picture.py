"""What the headers of a video stream say of its picture, without decoding it.

Decoders in hardware are made for one size and depth, and take no others; those in software allocate
what is announced. Only what our encoders write is read: 4:2:0, one picture.
"""

from torchcodec_weights.codecs.headers import av1, h264, hevc, vp9, vvc
from torchcodec_weights.codecs.headers.fields import Picture

__all__ = ["Picture", "read_picture"]

_READERS = {
    "vvc": vvc.read,
    "hevc": hevc.read,
    "h264": h264.read,
    "vp9": vp9.read,
    "av1": av1.read,
}


def read_picture(codec: str, stream: bytes) -> Picture:
    """Size and depth of the picture of a stream, which holds that picture alone.

    Args:
        codec: "vvc", "hevc", "h264", "vp9" or "av1".

    Raises:
        CodecError: the stream is not such as our encoders write, or has several pictures.
    """
    return _READERS[codec](stream)
