"""VP9 as a codec."""

from collections.abc import Mapping
from typing import ClassVar

from torchcodec_weights.codecs.records import EncoderSettings, RateCurve
from torchcodec_weights.codecs.video.base import HARDWARE_LINES, LibraryCodec, Preset


class VP9(LibraryCodec):
    """VP9: libvpx and FFmpeg's decoder, both in PyAV."""

    name = "vp9"
    standard = "VP9 Bitstream & Decoding Process Specification"
    encoder = "libvpx-vp9"
    decoder = "vp9"
    lines = HARDWARE_LINES
    quantizer_params = ("crf", "qmin", "qmax")
    separator = ""
    bit_depths = (8,)
    default_preset = "medium"
    _COMMON: ClassVar[dict[str, str]] = {
        "deadline": "good",
        "b": "0",
        "aq-mode": "0",
        "lag-in-frames": "0",
        "auto-alt-ref": "0",
    }
    table: ClassVar[Mapping[str, Preset]] = {
        "fast": Preset(
            {"cpu-used": "5"},
            RateCurve(
                (-4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5),
                (6.403, 5.408, 4.337, 3.787, 3.215, 2.641, 2.087, 1.589, 1.195, 0.653),
            ),
        ),
        "medium": Preset(
            {"cpu-used": "2"},
            RateCurve(
                (-4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5),
                (6.402, 5.412, 4.362, 3.831, 3.285, 2.705, 2.059, 1.525, 1.133, 0.698),
            ),
        ),
        "slow": Preset(
            {"cpu-used": "0"},
            RateCurve(
                (-4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5),
                (6.407, 5.418, 4.363, 3.832, 3.286, 2.711, 2.068, 1.533, 1.171, 0.574),
            ),
        ),
    }

    def quantizer_steps(self, depth: int) -> Mapping[int, float]:
        # ac_qlookup / 8 (clause 8.6.1), measured as for AV1.
        # fmt: off
        return {
            1: 1.34, 2: 1.85, 3: 2.38, 4: 2.91, 5: 3.41, 6: 3.95, 8: 4.96, 10: 5.96, 12: 6.97,
            15: 8.43, 18: 9.91, 22: 11.85, 26: 14.78, 30: 18.59, 34: 24.12, 38: 32.13, 42: 45.32,
        }
        # fmt: on

    def encoder_options(self, qp: int, settings: EncoderSettings) -> dict[str, str]:
        quantizer = dict.fromkeys(("crf", "qmin", "qmax"), str(qp))
        options = {**self._COMMON, **self._preset(settings).options, **quantizer}
        return {**options, **settings.encoder_params}
