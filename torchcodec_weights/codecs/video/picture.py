"""Size and depth of the picture of a video stream, from its headers, without decoding it.

Hardware decoders are created for one size and depth; software decoders allocate the announced size.
Only streams as our encoders write them are accepted: 4:2:0, one picture.
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
        CodecError: our encoders do not write such a stream, or it has several pictures.
    """
    return _READERS[codec](stream)
