"""Video codecs: a tile is an all-intra frame, luma only.

Presets are ours: a preset names the encoder's options for weights, which are noise. Searching block
sizes and prediction modes buys next to nothing on noise and takes most of an encoder's time, so the
faster presets leave it out; docs/codecs.md has the measurements behind every line here.
"""

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs import ffmpeg
from torchcodec_weights.codecs.base import (
    CodecError,
    CodecInfo,
    EncoderSettings,
    RateCurve,
    SampleCodec,
)


@dataclass(frozen=True)
class Preset:
    """An encoder's options for one preset, and the rate curve that they give.

    Attributes:
        options: option name to value, as the encoder spells them.
        curve: payload rate of 512 × 512 Gaussian tiles (benchmarks/rate_curve.py prints it).
    """

    options: Mapping[str, str]
    curve: RateCurve


class VideoCodec(SampleCodec):
    """A video codec by its encoder's and decoder's names in FFmpeg."""

    standard: ClassVar[str]
    encoder: ClassVar[str]
    decoder: ClassVar[str]
    table: ClassVar[Mapping[str, Preset]]
    # Beyond five deviations a weight costs a transform block more bits than a place aside.
    outlier_threshold = 5.0
    profiles = ("all-intra",)
    bit_depths = (10, 8)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "table" in cls.__dict__:
            cls.presets = tuple(cls.table)

    def info(self) -> CodecInfo:
        missing = self._missing_encoder()
        decodes = ffmpeg.pyav_has(self.decoder, "r")
        if not decodes:
            reason = f"no decoder {self.decoder!r} in PyAV" if ffmpeg.pyav() else None
            missing = reason or ffmpeg.INSTALL_PYAV
        return CodecInfo(
            name=self.name,
            standard=self.standard,
            lossy=True,
            encoder=None if self._missing_encoder() else self.encoder,
            decoders={"cpu": f"{self.decoder} (PyAV)"} if decodes else {},
            missing=missing,
        )

    @abstractmethod
    def _missing_encoder(self) -> str | None:
        """Why there is no encoder here, or None if there is one."""

    def depth(self, settings: EncoderSettings) -> int:
        return settings.bit_depth or self.bit_depths[0]

    def rate_curve(self, settings: EncoderSettings) -> RateCurve:
        return self._preset(settings).curve

    def _preset(self, settings: EncoderSettings) -> Preset:
        name = settings.preset or self.default_preset
        assert name is not None
        return self.table[name]

    def decode_frame(self, payload: bytes) -> tuple[NDArray[Any], int]:
        return ffmpeg.decode_luma(self.decoder, payload)


def h26x_steps(depth: int, lowest: int, highest: int) -> dict[int, float]:
    """Step of each QP in units of samples of `depth` bits: 2^((QP − 4)/6) at 8 bits.

    H.264 clause 8.5, H.265 clause 8.6.3, H.266 clause 8.7.3; QP counts from 0 at 8 bits, from
    −6·(depth − 8) at more, where encoders still take it from 0.
    """
    return {qp: 2.0 ** ((qp - 4) / 6 + depth - 8) for qp in range(lowest, highest + 1)}


class VVC(VideoCodec):
    """H.266/VVC: libvvenc in the ffmpeg program, FFmpeg's own decoder in PyAV."""

    name = "vvc"
    standard = "ITU-T H.266 | ISO/IEC 23090-3"
    encoder = "libvvenc"
    decoder = "vvc"
    bit_depths = (10,)
    default_preset = "fast"

    _ALWAYS: ClassVar[dict[str, str]] = {
        "perceptqpa": "0",
        "intraperiod": "1",
        "verbosity": "0",
        "hrdparameterspresent": "0",
    }
    # One block size, no search: noise has nothing to predict.
    _ONE_SIZE: ClassVar[dict[str, str]] = {"minqtislice": "32", "maxmttdepthi": "0"}
    _NO_TOOLS: ClassVar[dict[str, str]] = dict.fromkeys(
        ("mip", "isp", "mts", "lfnst", "bdpcm", "transformskip", "sao", "ccalf"), "0"
    )
    _CURVE: ClassVar[RateCurve] = RateCurve((-5.0, 1.0), (6.0, 0.5))
    table: ClassVar[Mapping[str, Preset]] = {
        "faster": Preset(
            {"preset": "faster", "depquant": "1", "signhideflag": "0", **_ONE_SIZE}, _CURVE
        ),
        "fast": Preset({"preset": "medium", **_ONE_SIZE, **_NO_TOOLS}, _CURVE),
        "medium": Preset({"preset": "medium"}, _CURVE),
        "slow": Preset({"preset": "slow"}, _CURVE),
        "slower": Preset({"preset": "slower"}, _CURVE),
    }

    def _missing_encoder(self) -> str | None:
        if ffmpeg.program() is None:
            return ffmpeg.INSTALL_PROGRAM
        if self.encoder not in ffmpeg.program_encoders():
            return f"{ffmpeg.program()} lacks libvvenc: pip install -U imageio-ffmpeg"
        return None

    def quantizer_steps(self, depth: int) -> Mapping[int, float]:
        return h26x_steps(depth, 0, 51)

    def encode_frames(
        self, frames: Sequence[NDArray[np.uint16]], qp: int, settings: EncoderSettings
    ) -> list[bytes]:
        options = {**self._preset(settings).options, **self._ALWAYS, **settings.encoder_params}
        preset = options.pop("preset")
        parameters = ":".join(f"{key}={value}" for key, value in options.items())
        arguments = ["-preset", preset, "-qp", str(qp), "-qpa", "0", "-vvenc-params", parameters]
        stream = ffmpeg.encode_with_program(self.encoder, arguments, "vvc", frames, 10)
        return split_access_units(stream)


_AUD = re.compile(rb"\x00\x00\x00\x01\x00\xa1.", re.DOTALL)


def split_access_units(stream: bytes) -> list[bytes]:
    """Cut a VVC Annex B stream before each access unit delimiter, and leave the delimiters out.

    Raises:
        CodecError: the stream does not start with a delimiter (H.266 clause 7.4.2.4.3).
    """
    starts = list(_AUD.finditer(stream))
    if not starts or starts[0].start() != 0:
        raise CodecError("VVC stream does not start with an access unit delimiter")
    ends = [match.start() for match in starts[1:]] + [len(stream)]
    return [stream[match.end() : end] for match, end in zip(starts, ends, strict=True)]
