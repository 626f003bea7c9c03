"""JPEG 2000 and HTJ2K as codecs."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.headers.fields import Picture, uncropped
from torchcodec_weights.codecs.image.base import ImageCodec
from torchcodec_weights.codecs.records import EncoderSettings, RateCurve
from torchcodec_weights.errors import CodecError


class _JPEG2000Family(ImageCodec):
    """JPEG 2000's codestream: weights are rounded to samples, which are coded without loss.

    Attributes:
        function: stem of imagecodecs' names for the encoder and the decoder.
        headers: bits per sample to the bytes after SIZ in the main header. Other headers are
            refused: OpenJPH 0.26 crashes if a segment is too short for the wavelet levels.
    """

    bit_depths = (8, 16)
    function: ClassVar[str]
    headers: ClassVar[Mapping[int, bytes]]
    # Markers, T.800 table A.2.
    _SOC_SIZ: ClassVar[bytes] = b"\xff\x4f\xff\x51"
    _SOT: ClassVar[bytes] = b"\xff\x90"
    _SOD: ClassVar[bytes] = b"\xff\x93"
    _EOC: ClassVar[bytes] = b"\xff\xd9"
    _COM: ClassVar[bytes] = b"\xff\x64"

    def depth(self, settings: EncoderSettings) -> int:
        return settings.bit_depth or self.bit_depths[0]

    def quantizer_steps(self, depth: int) -> Mapping[int, float]:
        return {1: 1.0}

    def encode_samples(self, samples: NDArray[Any], **options: Any) -> bytes:
        """Encode a picture without the comment that names the encoder."""
        stream = self.call(f"{self.function}_encode", samples, reversible=True, **options)
        output, position = stream[:2], 2
        while (marker := stream[position : position + 2]) != self._SOT:
            end = position + 2 + int.from_bytes(stream[position + 2 : position + 4], "big")
            if marker != self._COM:
                output += stream[position:end]
            position = end
        output += stream[position:]
        self.read_header(output)  # what another version of the encoder writes is not decoded
        return bytes(output)

    def read_header(self, payload: bytes) -> Picture:
        # T.800 table A.9: extent, offset, tile's extent and offset, components.
        width, height, *rest = (int.from_bytes(payload[i : i + 4], "big") for i in range(8, 40, 4))
        precision = 1 + int.from_bytes(payload[42:43], "big")
        size = (
            payload[:4] == self._SOC_SIZ
            and rest == [0, 0, width, height, 0, 0]
            and payload[40:42] + payload[43:45] == b"\0\1\1\1"
        )
        header = self.headers.get(precision)
        if not size or header is None or not payload.startswith(header, 45):
            raise CodecError(f"{self.name} stream has a header that this codec does not write")
        # The only tile-part of the only tile, up to the codestream's end: T.800 clause A.4.2.
        start = 45 + len(header)
        length = len(payload) - start - len(self._EOC)
        sot = b"\0\x0a\0\0" + max(length, 0).to_bytes(4, "big") + b"\0\1"
        if not payload.startswith(self._SOT + sot + self._SOD, start) or not payload.endswith(
            self._EOC
        ):
            raise CodecError(f"{self.name} stream is not one tile-part to its end")
        return uncropped(height, width, precision)

    def decode_samples(self, payload: bytes, **options: Any) -> tuple[NDArray[Any], int]:
        """Decode a picture: samples (height, width) and bits per sample."""
        frame = self.decoded(f"{self.function}_decode", payload, **options)
        return frame, 8 * frame.itemsize


class JPEG2000(_JPEG2000Family):
    """JPEG 2000: OpenJPEG, reversible, no wavelet. What remains is its block coder."""

    name = "jpeg2000"
    standard = "ITU-T T.800 | ISO/IEC 15444-1"
    library = "OpenJPEG"
    extension = "JPEG2K"
    function = "jpeg2k"
    # COD: one layer, no wavelet levels, 64 × 64 code blocks, reversible; QCD: no quantization.
    headers: ClassVar[Mapping[int, bytes]] = {
        8: bytes.fromhex("ff52000c00000001000004040001 ff5c00044040"),
        16: bytes.fromhex("ff52000c00000001000004040001 ff5c00044080"),
    }
    curve = RateCurve(
        (-4.5, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0),
        (6.875, 6.346, 5.3, 4.258, 3.742, 3.226, 2.718, 2.234, 1.766, 1.317, 0.832, 0.336),
    )

    def encode_frame(self, frame: NDArray[np.uint16], qp: int, settings: EncoderSettings) -> bytes:
        samples = frame.astype(f"u{self.depth(settings) // 8}")
        return self.encode_samples(samples, resolutions=1, codecformat="j2k", numthreads=1)

    def decode_frame(self, payload: bytes) -> tuple[NDArray[Any], int]:
        return self.decode_samples(payload, numthreads=1)


class HTJ2K(_JPEG2000Family):
    """High-throughput JPEG 2000: OpenJPH, reversible, its block coder on the samples themselves.

    Through imagecodecs, OpenJPH applies at least one level of wavelets. So the picture is twice as
    wide and high as the frame, with the frame as its low-pass band. The other bands are empty and
    take next to nothing. The frame is decoded as the picture at half its resolution; in the whole
    picture it is the samples of even rows and columns.
    """

    name = "htj2k"
    standard = "ITU-T T.814 | ISO/IEC 15444-15"
    library = "OpenJPH"
    extension = "HTJ2K"
    function = "htj2k"
    # CAP; COD: one layer, one level of 5/3 wavelets, 64 × 64 code blocks; QCD: no quantization.
    headers: ClassVar[Mapping[int, bytes]] = {
        8: bytes.fromhex("ff500008000200000001 ff52000c00020001000104044001 ff5c00072048484848"),
        16: bytes.fromhex("ff500008000200000009 ff52000c00020001000104044001 ff5c00072088888888"),
    }
    curve = RateCurve(
        (-4.5, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0),
        (7.2, 6.675, 5.604, 4.532, 3.993, 3.441, 2.889, 2.364, 1.933, 1.486, 0.925, 0.388),
    )

    def encode_frame(self, frame: NDArray[np.uint16], qp: int, settings: EncoderSettings) -> bytes:
        height, width = frame.shape
        picture = np.empty((2 * height, 2 * width), f"u{self.depth(settings) // 8}")
        # Reversible 5/3 synthesis (T.800 equation F.5) of a low-pass band and an empty high one.
        rows = picture[::2]
        rows[:, ::2] = frame
        rows[:, 1:-1:2] = (frame[:, :-1].astype(np.uint32) + frame[:, 1:]) >> 1
        rows[:, -1] = frame[:, -1]
        picture[1:-1:2] = (rows[:-1].astype(np.uint32) + rows[1:]) >> 1
        picture[-1] = rows[-1]
        return self.encode_samples(picture, resolutions=1)

    def read_header(self, payload: bytes) -> Picture:
        whole = super().read_header(payload)
        return uncropped(-(-whole.height // 2), -(-whole.width // 2), whole.depth)

    def decode_frame(self, payload: bytes) -> tuple[NDArray[Any], int]:
        return self.decode_samples(payload, skipres=1)
