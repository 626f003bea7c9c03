"""A tile's bitstream as a file of its standard."""

import struct

from torchcodec_weights.format.tiling import frame_shape

_SUFFIXES = {
    "vvc": ".vvc",
    "hevc": ".265",
    "h264": ".264",
    "av1": ".ivf",
    "vp9": ".ivf",
    "jpeg": ".jpg",
    "jpeg2000": ".j2k",
    "htj2k": ".j2c",
    "jpegxl": ".jxl",
    "ectcq": ".ectcq",
}
# Codecs whose frames do not mark their end. Other payloads are complete files.
_IVF = {"av1": b"AV01", "vp9": b"VP90"}


def suffix(codec: str) -> str:
    """The usual suffix of a codec's files; ".bin" if it has none."""
    return _SUFFIXES.get(codec, ".bin")


def tile_file(codec: str, payload: bytes, shape: tuple[int, int]) -> bytes:
    """The contents of the file.

    Args:
        codec: name of the codec.
        payload: the tile's bitstream.
        shape: rows and columns of the tile.
    """
    if codec not in _IVF:
        return payload
    height, width = frame_shape(shape[0] * shape[1], shape[1])
    # Signature, version, size of this header, fourcc, width, height, one frame per second, frames.
    header = struct.pack("<4sHH4sHHIIII", b"DKIF", 0, 32, _IVF[codec], width, height, 1, 1, 1, 0)
    return header + struct.pack("<IQ", len(payload), 0) + payload
