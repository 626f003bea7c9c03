"""JPEG XL as a codec."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.headers import jpegxl
from torchcodec_weights.codecs.headers.fields import Picture, uncropped
from torchcodec_weights.codecs.image.base import gaussian_gain
from torchcodec_weights.codecs.image.jpeg import JPEG
from torchcodec_weights.codecs.records import EncodedTile, EncoderSettings, FloatArray, RateCurve
from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.tiling import to_frame


@dataclass(frozen=True)
class _Effort:
    """A preset of JPEG XL.

    Attributes:
        modular: libjxl's effort in modular mode; None to use VarDCT at every step.
        curve: payload rate of 512 × 512 Gaussian tiles.
    """

    modular: int | None
    curve: RateCurve


class JPEGXL(JPEG):
    """JPEG XL: libjxl in its modular mode, without loss on rounded weights, or in VarDCT mode.

    In VarDCT mode, libjxl recompresses a JPEG stream to a frame with the same coefficients. It is
    faster, and takes fewer bits if there are more levels than libjxl's adaptive trees can learn
    from a tile. At low rates, its error harms a language model more.

    Only the codestream of a recompressed JPEG is kept, without the data that would restore the JPEG
    file. Its header is changed to announce samples of 12 bits, so that libjxl decodes to 12 bits:
    8 would cost 3 dB at 6 bits.
    """

    name = "jpegxl"
    standard = "ISO/IEC 18181-1"
    library = "libjxl"
    extension = "JPEGXL"
    default_preset = "medium"
    table: ClassVar[Mapping[str, _Effort]] = {
        "fast": _Effort(
            None,
            RateCurve(
                (-4.5, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0),
                (6.613, 6.112, 5.112, 4.123, 3.62, 3.119, 2.631, 2.154, 1.702, 1.278, 0.813, 0.327),
            ),
        ),
        "medium": _Effort(
            6,
            RateCurve(
                (-4.5, -4.0, -3.0, -2.1, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0),
                (
                    6.613,
                    6.112,
                    5.112,
                    4.222,
                    4.159,
                    3.647,
                    3.137,
                    2.637,
                    2.14,
                    1.674,
                    1.252,
                    0.786,
                    0.314,
                ),
            ),
        ),
        "slow": _Effort(
            9,
            RateCurve(
                (-4.5, -4.0, -3.0, -2.1, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0),
                (
                    6.613,
                    6.112,
                    5.112,
                    4.222,
                    4.084,
                    3.579,
                    3.078,
                    2.589,
                    2.115,
                    1.662,
                    1.249,
                    0.786,
                    0.312,
                ),
            ),
        ),
    }
    presets = tuple(table)
    _MANY_LEVELS: ClassVar[int] = 40  # from which on VarDCT takes fewer bits; at 4.1 bits

    def rate_curve(self, settings: EncoderSettings) -> RateCurve:
        return self._effort(settings).curve

    def _effort(self, settings: EncoderSettings) -> _Effort:
        return self.table[settings.preset or self.default_preset]

    def encode(
        self,
        tile: FloatArray,
        step: float,
        peak: float,
        private: bytes,
        settings: EncoderSettings,
    ) -> EncodedTile:
        effort = self._effort(settings).modular
        if effort is None or 2 * peak / step > self._MANY_LEVELS:
            return super().encode(tile, step, peak, private, settings)
        samples = to_frame(tile, step, 8).astype(np.uint8)
        options = {"lossless": True, "effort": effort, "usecontainer": False, "numthreads": 1}
        payload = self.call("jpegxl_encode", samples, **options)
        gain = gaussian_gain(step, lambda levels: levels)
        return EncodedTile(payload, float(np.float32(step * gain)))

    def reconstruction(self, levels: NDArray[np.float64]) -> NDArray[np.float64]:
        # Of VarDCT: the default quant_bias of the Y channel and quant_bias_numerator.
        return np.where(levels == 1, 1 - 0.07005449891748593, levels - 0.145 / levels)

    def encode_frame(self, frame: NDArray[np.uint16], qp: int, settings: EncoderSettings) -> bytes:
        jpeg = super().encode_frame(frame, qp, settings)
        stream = _codestream(self.call("jpegxl_encode_jpeg", jpeg, numthreads=1))
        image = jpegxl.read_image(stream)
        if image.depth != 8:
            raise CodecError("libjxl wrote a header that this codec does not know")
        header = int.from_bytes(stream[: image.end], "little")
        header |= 2 << image.depth_position  # of 8, 10 and 12
        return header.to_bytes(image.end, "little") + stream[image.end :]

    def read_header(self, payload: bytes) -> Picture:
        image = jpegxl.read_image(payload)
        if image.depth not in (8, 12):
            raise CodecError(f"jpegxl stream has a depth of {image.depth} bits")
        jpegxl.check_frame(payload, image)
        return uncropped(image.height, image.width, image.depth)

    def decode_frame(self, payload: bytes) -> tuple[NDArray[Any], int]:
        frame = self.decoded("jpegxl_decode", payload, numthreads=1)
        if frame.dtype == np.uint8:
            return frame, 8
        # White is 4095 in 12 bits and 255 in 8 bits, where one sample is worth 16.
        return frame * np.float32(16 * 255 / 4095), 12


def _codestream(container: bytes) -> bytes:
    """The codestream in a JPEG XL container, ISO/IEC 18181-2: boxes `jxlc`, or `jxlp` in order."""
    pieces, position = [], 0
    while position < len(container):
        size = int.from_bytes(container[position : position + 4], "big") or len(container)
        kind = container[position + 4 : position + 8]
        if kind in (b"jxlc", b"jxlp"):
            skipped = 8 if kind == b"jxlc" else 12  # a part begins with its number
            pieces.append(container[position + skipped : position + size])
        position += size
    return b"".join(pieces)
