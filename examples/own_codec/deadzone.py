"""A codec of one's own: uniform quantization with a dead zone, and LZMA."""

import lzma
from typing import Any

import numpy as np

from torchcodec_weights.codecs.base import Codec
from torchcodec_weights.codecs.records import CodecInfo, EncodedTile, EncoderSettings, RateCurve
from torchcodec_weights.errors import CodecError

# Added before values are cut to levels. 0.5 would round; less makes more zeros, which cost less.
OFFSET = 0.4


class Deadzone(Codec):
    name = "deadzone"

    def info(self) -> CodecInfo:
        return CodecInfo(self.name, "none", lossy=True, encoder="lzma", decoders={"cpu": "lzma"})

    def rate_curve(self, settings: EncoderSettings) -> RateCurve:
        # Bits per weight against log2(step) for Gaussian tiles, where rate control starts.
        return RateCurve((-3.0, 0.0, 1.0), (5.4, 2.4, 1.4))

    def step_range(self, peak: float, settings: EncoderSettings) -> tuple[float, float]:
        return 2 * peak / 254, 4.0  # levels of 8 bits

    def encode(
        self, tile: Any, step: float, peak: float, private: bytes, settings: EncoderSettings
    ) -> EncodedTile:
        levels = np.sign(tile) * np.floor(np.abs(tile) / step + OFFSET)
        return EncodedTile(lzma.compress(levels.astype(np.int8).tobytes()), step)

    def decode(
        self, payload: bytes, unit: float, private: bytes, shape: tuple[int, int], out: Any
    ) -> None:
        # One byte more than is wanted: a payload that lies expands to no more than that.
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2**26)
        try:
            data = decoder.decompress(payload, out.size + 1)
        except lzma.LZMAError as error:
            raise CodecError(f"deadzone: {error}") from error
        if len(data) != out.size:
            raise CodecError(f"deadzone: {len(data)} weights for a tile of {out.size}")
        np.multiply(np.frombuffer(data, np.int8).reshape(shape), np.float32(unit), out=out)
