"""H.266/VVC as a codec."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.records import EncoderSettings, RateCurve
from torchcodec_weights.codecs.video import ffmpeg
from torchcodec_weights.codecs.video.base import PROBE_SIDE, Preset, VideoCodec, joined
from torchcodec_weights.codecs.video.h26x import h26x_steps, without_nal_units
from torchcodec_weights.errors import CodecError, StepTooFineError

_VVC_DELIMITER = 20  # AUD_NUT, H.266 table 5


class VVC(VideoCodec):
    """H.266/VVC: libvvenc in the ffmpeg program, FFmpeg's own decoder in PyAV."""

    name = "vvc"
    standard = "ITU-T H.266 | ISO/IEC 23090-3"
    encoder = "libvvenc"
    decoder = "vvc"
    bit_depths = (10,)
    default_preset = "medium"

    _ALWAYS: ClassVar[dict[str, str]] = {
        "perceptqpa": "0",
        "intraperiod": "1",
        "gopsize": "1",
        "verbosity": "0",
        "hrdparameterspresent": "0",
    }
    # One block size, no search: noise has nothing to predict.
    _ONE_SIZE: ClassVar[dict[str, str]] = {"minqtislice": "32", "maxmttdepthi": "0"}
    _NO_TOOLS: ClassVar[dict[str, str]] = dict.fromkeys(
        ("mip", "isp", "mts", "lfnst", "bdpcm", "transformskip", "sao", "ccalf"), "0"
    )
    table: ClassVar[Mapping[str, Preset]] = {
        "faster": Preset(
            {"preset": "faster", "depquant": "1", "signhideflag": "0", **_ONE_SIZE, **_NO_TOOLS},
            RateCurve(
                (-4.5, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5),
                (7.404, 6.743, 5.733, 4.641, 4.133, 3.651, 3.129, 2.601, 2.068, 1.544, 1.13),
            ),
        ),
        "medium": Preset(
            {"preset": "medium", **_ONE_SIZE, **_NO_TOOLS},
            RateCurve(
                (-4.5, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0),
                (7.364, 6.715, 5.717, 4.62, 4.116, 3.634, 3.109, 2.582, 2.055, 1.527, 1.117, 0.206),
            ),
        ),
        "slow": Preset(
            {"preset": "medium"},
            RateCurve(
                (-4.5, -3.0, -1.5, -0.5, 0.5, 1.5), (7.582, 5.723, 4.12, 3.106, 2.051, 1.131)
            ),
        ),
        "slower": Preset(
            {"preset": "slow"},
            RateCurve(
                (-4.5, -3.0, -1.5, -0.5, 0.5, 1.5), (7.571, 5.726, 4.123, 3.109, 2.055, 1.133)
            ),
        ),
    }

    def _missing_encoder(self) -> str | None:
        if ffmpeg.program() is None:
            return ffmpeg.INSTALL_PROGRAM
        if self.encoder not in ffmpeg.program_encoders():
            return f"{ffmpeg.program()} lacks libvvenc: pip install -U imageio-ffmpeg"
        return None

    def quantizer_steps(self, depth: int) -> Mapping[int, float]:
        return h26x_steps(depth, 0, 51)

    def encode_frame(self, frame: NDArray[np.uint16], qp: int, settings: EncoderSettings) -> bytes:
        options = {**self._preset(settings).options, **self._ALWAYS, **settings.encoder_params}
        preset = options.pop("preset")
        arguments = ["-preset", preset, "-qp", str(qp), "-qpa", "0"]
        arguments += ["-vvenc-params", joined(options)]
        # One frame in a run: libvvenc gives the frames of a sequence different QPs.
        try:
            stream = ffmpeg.encode_with_program(self.encoder, arguments, "vvc", frame, 10)
        except CodecError as error:
            # FFmpeg gives libvvenc room for a byte a sample and says no more of what does not fit.
            if "Error submitting video frame" in str(error):
                raise StepTooFineError(
                    f"libvvenc writes at most 8 bits a sample, and failed at QP {qp}, perhaps for "
                    f"want of more: {error}"
                ) from error
            raise
        return without_nal_units(stream, lambda header: header[1] >> 3 == _VVC_DELIMITER)

    def _refusal(
        self, settings: EncoderSettings, params: tuple[tuple[str, str], ...]
    ) -> str | None:
        gray = np.full((PROBE_SIDE, PROBE_SIDE), 512, np.uint16)
        try:
            self.encode_frame(gray, 30, replace(settings, encoder_params=dict(params)))
        except CodecError as error:
            return str(error).partition("\n")[0]
        return None
