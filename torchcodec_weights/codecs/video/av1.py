"""AV1 as a codec."""

import os
from collections.abc import Mapping
from typing import ClassVar

from torchcodec_weights.codecs.records import EncoderSettings, RateCurve
from torchcodec_weights.codecs.video.base import HARDWARE_LINES, LibraryCodec, Preset, joined


class AV1(LibraryCodec):
    """AV1: SVT-AV1 and dav1d, both in PyAV."""

    name = "av1"
    standard = "AOMedia AV1 Bitstream & Decoding Process Specification"
    encoder = "libsvtav1"
    decoder = "libdav1d"
    lines = HARDWARE_LINES
    default_preset = "medium"
    _COMMON: ClassVar[dict[str, str]] = {
        "rc": "0",
        "keyint": "1",
        "tune": "1",
        "aq-mode": "0",
        "enable-dlf": "0",
        "enable-cdef": "0",
        "enable-restoration": "0",
        "enable-tf": "0",
        "lp": "1",
    }
    table: ClassVar[Mapping[str, Preset]] = {
        "fast": Preset(
            {"preset": "10"},
            RateCurve(
                (-4.5, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5),
                (
                    6.516,
                    6.259,
                    5.265,
                    4.224,
                    3.714,
                    3.207,
                    2.699,
                    2.186,
                    1.926,
                    1.666,
                    1.235,
                    0.853,
                ),
            ),
        ),
        "medium": Preset(
            {"preset": "6"},
            RateCurve(
                (-4.5, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5),
                (6.484, 6.238, 5.234, 4.217, 3.692, 3.19, 2.678, 2.16, 1.91, 1.643, 1.195, 0.791),
            ),
        ),
        "slow": Preset(
            {"preset": "4"},
            RateCurve(
                (-4.5, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5),
                (6.491, 6.241, 5.236, 4.22, 3.692, 3.197, 2.678, 2.159, 1.916, 1.65, 1.191, 0.797),
            ),
        ),
    }
    # Ac_Qlookup / 8 (clause 7.12.2) for SVT-AV1's qp, measured: the relative sample scales at which
    # Gaussian tiles take 3.0 bits, times the one step.
    # fmt: off
    _STEPS: ClassVar[dict[int, dict[int, float]]] = {
        8: {2: 1.73, 3: 2.40, 4: 3.01, 5: 3.60, 6: 4.16, 8: 5.24, 10: 6.31, 12: 7.37, 15: 9.03,
            18: 10.79, 22: 12.99, 26: 16.42, 30: 20.67, 34: 27.38, 38: 38.14, 42: 57.1},
        10: {3: 3.50, 4: 6.11, 5: 8.92, 6: 11.73, 8: 16.45, 10: 21.25, 12: 26.30, 15: 33.75,
             18: 41.34, 22: 50.74, 26: 64.86, 30: 82.68, 34: 108.97, 38: 152.85, 42: 228.3},
    }
    # fmt: on

    def quantizer_steps(self, depth: int) -> Mapping[int, float]:
        return self._STEPS[depth]

    def encoder_options(self, qp: int, settings: EncoderSettings) -> dict[str, str]:
        options = {**self._COMMON, **settings.encoder_params, "qp": str(qp)}
        preset = self._preset(settings).options["preset"]
        os.environ.setdefault("SVT_LOG", "1")  # errors only; it prints its settings otherwise
        return {"preset": preset, "svtav1-params": joined(options)}
