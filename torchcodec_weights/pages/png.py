"""Gray pictures as PNG (ISO/IEC 15948), without a package for images."""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_GRAY = 0  # color type


def png(picture: NDArray[np.uint8]) -> bytes:
    """A file of a picture, uint8 (height, width), gray."""
    height, width = picture.shape
    # Each line begins with the number of its filter, 0 for none.
    lines = np.zeros((height, width + 1), np.uint8)
    lines[:, 1:] = picture
    # Depth 8, deflate, adaptive filters, not interlaced.
    header = struct.pack(">IIBBBBB", width, height, 8, _GRAY, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, data)
        for kind, data in (
            (b"IHDR", header),
            (b"IDAT", zlib.compress(lines.tobytes(), 9)),
            (b"IEND", b""),
        )
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
