"""JPEG: the segments of a baseline stream of one gray picture, ITU-T T.81 annex B."""

import re

from torchcodec_weights.errors import CodecError

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
# Segments in the order of the stream, each as far as it is the same in all streams.
_DQT = b"\xff\xdb\x00\x43\x00"
_SOF0 = b"\xff\xc0\x00\x0b\x08"
_DHT = b"\xff\xc4"
_SOS = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
_SEGMENTS = (_DQT, _SOF0, _DHT, _DHT, _SOS)
_COMPONENT = b"\x01\x01\x11\x00"  # one, number 1, not subsampled, quantization table 0
_MARKER = re.compile(rb"\xff[^\x00]")


def read(stream: bytes) -> tuple[int, int]:
    """Height and width of the picture of a stream.

    Decoders accept standalone markers, fill bytes, second headers and restart intervals anywhere.
    Our encoder writes none of them, so they are refused. Then the stream is unambiguous.

    Raises:
        CodecError: anything but SOI, DQT, SOF0, two of DHT, SOS, entropy-coded data and EOI.
    """
    position = 2 if stream.startswith(_SOI) else len(stream)
    size: tuple[int, int] | None = None
    for segment in _SEGMENTS:
        end = position + 2 + int.from_bytes(stream[position + 2 : position + 4], "big")
        if not stream.startswith(segment, position) or end > len(stream):
            raise CodecError("jpeg stream has other segments than its encoder writes")
        if segment is _SOF0:
            frame = stream[position + 5 : end]
            if frame[4:] != _COMPONENT:
                raise CodecError("jpeg stream has another picture than a gray one")
            size = int.from_bytes(frame[:2], "big"), int.from_bytes(frame[2:4], "big")
        position = end
    assert size is not None
    marker = _MARKER.search(stream, position)
    if marker is None or stream[marker.start() :] != _EOI:
        raise CodecError("jpeg stream does not end with the data of its scan")
    return size
