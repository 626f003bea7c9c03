"""H.264/AVC by x264 and HEVC by x265."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.records import EncoderSettings, RateCurve
from torchcodec_weights.codecs.video.base import HARDWARE_LINES, LibraryCodec, Preset, joined
from torchcodec_weights.codecs.video.h26x import h26x_steps, without_nal_units

_H264_SEI = 6  # H.264 table 7-1


class _H26x(LibraryCodec):
    """Base class of the codecs by x264 and x265."""

    params_option: ClassVar[str]
    # Without psychovisual tools, which optimize for the eye, and filters, which blur noise.
    common: ClassVar[Mapping[str, str]] = {
        "repeat-headers": "1",
        "keyint": "1",
        "ipratio": "1",
        "aq-mode": "0",
        "no-deblock": "1",
        "rc-lookahead": "0",
        "bframes": "0",
    }

    def quantizer_steps(self, depth: int) -> Mapping[int, float]:
        return h26x_steps(depth, 1, 51)

    def encoder_options(self, qp: int, settings: EncoderSettings) -> dict[str, str]:
        options = {**self._preset(settings).options, **self.common, **settings.encoder_params}
        preset = options.pop("preset")
        options["qp"] = str(self.encoder_qp(qp, self.depth(settings)))
        return {"preset": preset, self.params_option: joined(options)}

    def encoder_qp(self, qp: int, depth: int) -> int:
        """The encoder's own number for a QP."""
        return qp


class HEVC(_H26x):
    """H.265/HEVC: x265 and FFmpeg's decoder, both in PyAV."""

    name = "hevc"
    standard = "ITU-T H.265 | ISO/IEC 23008-2"
    encoder = "libx265"
    decoder = "hevc"
    lines = HARDWARE_LINES
    default_preset = "medium"
    params_option = "x265-params"
    common: ClassVar[Mapping[str, str]] = {
        **_H26x.common,
        "log-level": "0",
        "info": "0",
        "psy-rd": "0",
        "psy-rdoq": "0",
        "no-cutree": "1",
        "no-sao": "1",
        "no-scenecut": "1",
        "frame-threads": "1",
        "pools": "none",
        "wpp": "0",
    }
    _RDOQ: ClassVar[dict[str, str]] = {"rd": "6", "rdoq-level": "2"}
    _ONE_SIZE: ClassVar[dict[str, str]] = {"ctu": "32", "min-cu-size": "32"}
    table: ClassVar[Mapping[str, Preset]] = {
        "fast": Preset(
            {"preset": "medium", "rd": "3", "rdoq-level": "1", **_ONE_SIZE},
            RateCurve(
                (-4.5, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0),
                (7.223, 6.601, 5.361, 4.209, 3.661, 3.145, 2.606, 2.04, 1.455, 0.858),
            ),
        ),
        "medium": Preset(
            {"preset": "medium", **_RDOQ, **_ONE_SIZE},
            RateCurve(
                (-4.5, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0),
                (7.223, 6.603, 5.361, 4.208, 3.66, 3.144, 2.605, 2.038, 1.45, 0.836),
            ),
        ),
        "slow": Preset(
            {"preset": "medium", **_RDOQ},
            RateCurve(
                (-4.5, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0),
                (7.4, 6.777, 5.498, 4.218, 3.67, 3.154, 2.61, 2.041, 1.46, 0.863),
            ),
        ),
    }


class H264(_H26x):
    """H.264/AVC: x264 and FFmpeg's decoder, both in PyAV."""

    name = "h264"
    standard = "ITU-T H.264 | ISO/IEC 14496-10"
    encoder = "libx264"
    decoder = "h264"
    bit_depths = (8, 10)  # hardware decodes 8
    default_preset = "medium"
    even_rows = False
    params_option = "x264-params"
    common: ClassVar[Mapping[str, str]] = {
        **_H26x.common,
        "psy": "0",
        "no-mbtree": "1",
        "sync-lookahead": "0",
        "weightp": "0",
    }
    # "ultrafast" is the only way to make x264 take 16 x 16 prediction alone, with its Hadamard
    # transform of the DC coefficients: given the choice it takes 4 x 4, 0.4 dB worse on noise.
    _ONE_SIZE: ClassVar[dict[str, str]] = {"preset": "ultrafast", "cabac": "1"}
    table: ClassVar[Mapping[str, Preset]] = {
        "fast": Preset(
            {**_ONE_SIZE, "subme": "1", "trellis": "1"},
            RateCurve(
                (-4.5, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5),
                (7.55, 6.701, 5.308, 4.212, 3.652, 3.129, 2.59, 2.07, 1.52, 0.934, 0.265),
            ),
        ),
        "medium": Preset(
            {**_ONE_SIZE, "subme": "8", "trellis": "2"},
            RateCurve(
                (-4.5, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5),
                (7.556, 6.704, 5.31, 4.213, 3.652, 3.128, 2.59, 2.069, 1.519, 0.933, 0.261),
            ),
        ),
        "veryslow": Preset(
            {"preset": "veryslow"},
            RateCurve(
                (-4.5, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5),
                (7.677, 6.815, 5.473, 4.386, 3.824, 3.296, 2.747, 2.197, 1.518, 0.933, 0.255),
            ),
        ),
    }

    def encode_frame(self, frame: NDArray[np.uint16], qp: int, settings: EncoderSettings) -> bytes:
        # x264 writes its name and settings into every stream, 500 bytes.
        stream = super().encode_frame(frame, qp, settings)
        return without_nal_units(stream, lambda header: header[0] & 31 == _H264_SEI)

    def encoder_qp(self, qp: int, depth: int) -> int:
        return qp + 6 * (depth - 8)  # x264 counts from the lowest QP of the bit depth
