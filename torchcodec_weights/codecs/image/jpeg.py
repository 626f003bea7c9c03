"""JPEG as a codec."""

from collections.abc import Iterator, Mapping
from functools import cache
from math import ceil, pi, sqrt
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.headers import jpeg
from torchcodec_weights.codecs.headers.fields import Picture, uncropped
from torchcodec_weights.codecs.image.base import ImageCodec
from torchcodec_weights.codecs.records import EncoderSettings, FloatArray, RateCurve
from torchcodec_weights.errors import CodecError


def _dct() -> FloatArray:
    """The DCT of 8 × 8 blocks (T.81 clause A.3.3) as a matrix (64, 64); it is orthonormal."""
    n = np.arange(8)
    rows = 0.5 * np.cos((2 * n + 1) * n[:, None] * pi / 16)
    rows[0] /= sqrt(2)
    return np.kron(rows, rows).astype(np.float32)


def _zigzag() -> list[int]:
    """Row-major index of each coefficient in zigzag order, T.81 figure A.6."""

    def place(index: int) -> tuple[int, int]:
        row, column = divmod(index, 8)
        return row + column, row if (row + column) % 2 else column

    return sorted(range(64), key=place)


# Markers, T.81 table B.1.
_SOI, _SOF0, _SOF1, _SOS, _DQT, _APP0 = b"\xff\xd8", 0xC0, 0xC1, 0xDA, 0xDB, 0xE0

_DCT = _dct()
_ZIGZAG = _zigzag()


def _segments(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and what follows the length, for each segment of a JPEG stream.

    The last is the scan, whose entropy-coded data is taken with it.

    Raises:
        CodecError: not such a sequence.
    """
    position = 2
    while stream[:2] == _SOI and len(stream) >= position + 4 and stream[position] == 0xFF:
        marker = stream[position + 1]
        end = position + 2 + int.from_bytes(stream[position + 2 : position + 4], "big")
        if marker == _SOS:
            yield marker, stream[position + 4 :]
            return
        yield marker, stream[position + 4 : end]
        position = end
    raise CodecError("jpeg stream has no scan")


class JPEG(ImageCodec):
    """JPEG, baseline: libjpeg-turbo with coefficients and a quantization table of our own.

    libjpeg-turbo takes samples, not coefficients, and has a table optimized for the eye. So its
    input is the picture whose coefficients are our levels times its table, in 12 bits, which is
    exact enough to recover each level. Then its table and its precision are replaced in the stream
    by a flat table and 8 bits. The result is a baseline stream with optimized Huffman tables.
    """

    name = "jpeg"
    standard = "ITU-T T.81 | ISO/IEC 10918-1"
    library = "libjpeg-turbo"
    extension = "JPEG8"
    curve = RateCurve(
        (-4.5, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0),
        (6.708, 6.202, 5.204, 4.24, 3.737, 3.242, 2.726, 2.256, 1.774, 1.324, 0.856, 0.364),
    )
    _SCAN_HEADER: ClassVar[int] = 8  # bytes, with its length, for one component
    _HALF: ClassVar[int] = 2**11

    def depth(self, settings: EncoderSettings) -> int:
        return 12  # 16 in 12 bits are one in 8

    def quantizer_steps(self, depth: int) -> Mapping[int, float]:
        return {entry: 16.0 * entry for entry in range(1, 256)}

    def encode_frame(self, frame: NDArray[np.uint16], qp: int, settings: EncoderSettings) -> bytes:
        height, width = frame.shape
        samples = frame.astype(np.float32) - self._HALF
        blocks = samples.reshape(height // 8, 8, width // 8, 8).swapaxes(1, 2).reshape(-1, 64)
        levels = np.rint(blocks @ (_DCT.T / np.float32(16 * qp)))
        quality = 50
        table = self._table(quality)
        peak = float(np.abs((levels * table) @ _DCT).max())
        if peak > 0:
            # The coarsest table with a picture within 12 bits, by jpeg_quality_scaling().
            factor = 0.95 * self._HALF / peak
            quality = ceil(100 - 50 * factor if factor < 1 else max(50 / factor, 1))
            table = self._table(quality)
        blocks = np.rint((levels * table) @ _DCT).reshape(height // 8, width // 8, 8, 8)
        picture = blocks.swapaxes(1, 2).reshape(height, width) + self._HALF
        picture = np.clip(picture, 0, 2 * self._HALF - 1).astype(np.uint16)
        stream = self.call("jpeg8_encode", picture, quality, bitspersample=12, optimize=True)
        return self._baseline(stream, qp)

    def _baseline(self, stream: bytes, entry: int) -> bytes:
        """A stream of 12 bits as one of 8 with the same levels, a flat table and no JFIF."""
        output = bytearray(_SOI)
        for marker, contents in _segments(stream):
            if marker == _APP0:
                continue
            length = self._SCAN_HEADER if marker == _SOS else 2 + len(contents)
            if marker == _SOF1:
                marker, contents = _SOF0, b"\x08" + contents[1:]
            elif marker == _DQT:
                contents = contents[:1] + bytes([entry]) * 64
            output += bytes([0xFF, marker]) + length.to_bytes(2, "big") + contents
        return bytes(output)

    @cache  # noqa: B019 - codecs are not collected
    def _table(self, quality: int) -> FloatArray:
        """libjpeg-turbo's table of a quality, row-major (64,)."""
        blank = np.full((8, 8), self._HALF, np.uint16)
        stream = self.call("jpeg8_encode", blank, quality, bitspersample=12)
        entries = next(contents for marker, contents in _segments(stream) if marker == _DQT)
        table = np.empty(64, np.float32)
        table[_ZIGZAG] = np.frombuffer(entries[1:65], np.uint8)
        return table

    def read_header(self, payload: bytes) -> Picture:
        return uncropped(*jpeg.read(payload), depth=8)

    def decode_frame(self, payload: bytes) -> tuple[NDArray[Any], int]:
        return self.decoded("jpeg8_decode", payload).astype(np.uint16) << 4, 12
