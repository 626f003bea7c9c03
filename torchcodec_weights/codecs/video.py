"""Video codecs: a tile is an all-intra frame, luma only.

Presets are ours: a preset names the encoder's options for weights, which are noise. Searching block
sizes and prediction modes buys next to nothing on noise and takes most of an encoder's time, so the
faster presets leave it out; docs/codecs.md has the measurements behind every line here.
"""

import os
import re
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs import ffmpeg
from torchcodec_weights.codecs.base import CodecInfo, EncoderSettings, RateCurve, SampleCodec
from torchcodec_weights.codecs.picture import Picture, read_picture
from torchcodec_weights.errors import CodecError
from torchcodec_weights.tiling import frame_width

# NVDEC takes no HEVC picture of less than 144 lines, and no VP9 or AV1 picture of less than 128. A
# tile may have three quarters of the weights that it should have.
_HARDWARE_LINES = 192
_LARGEST_MARGIN = 64  # samples, to a multiple of the smallest coding block


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
    """A video codec by its encoder's and decoder's names in FFmpeg.

    Attributes:
        lines: how many lines the picture of a tile should have at least, 0 if any number will do.
        quantizer_params: names of the encoder's parameters that set the quantizer.
        separator: what stands between parameters where the encoder takes all in one option, or "".
    """

    standard: ClassVar[str]
    encoder: ClassVar[str]
    decoder: ClassVar[str]
    table: ClassVar[Mapping[str, Preset]]
    # Beyond five deviations a weight costs a transform block more bits than a place aside.
    outlier_threshold = 5.0
    profiles = ("all-intra",)
    lines: ClassVar[int] = 0
    quantizer_params: ClassVar[tuple[str, ...]] = ("qp",)
    separator: ClassVar[str] = ":"
    bit_depths: ClassVar[tuple[int, ...]] = (10, 8)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "table" in cls.__dict__:
            cls.presets = tuple(cls.table)

    def weights_per_tile(self, cols: int) -> int:
        return max(self.tile_weights, self.lines * frame_width(cols, self.tile_weights))

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

    def _missing_encoder(self) -> str | None:
        """Why there is no encoder here, or None if there is one."""
        if ffmpeg.pyav() is None:
            return ffmpeg.INSTALL_PYAV
        return None if ffmpeg.pyav_has(self.encoder, "w") else f"PyAV lacks {self.encoder}"

    def depth(self, settings: EncoderSettings) -> int:
        return settings.bit_depth or self.bit_depths[0]

    def rate_curve(self, settings: EncoderSettings) -> RateCurve:
        return self._preset(settings).curve

    def _preset(self, settings: EncoderSettings) -> Preset:
        name = settings.preset or self.default_preset
        assert name is not None
        return self.table[name]

    def _picture(self, payload: bytes) -> Picture:
        """What a stream's headers say of its picture.

        Raises:
            CodecError: not such as our encoders write.
        """
        picture = read_picture(self.name, payload)
        if picture.depth not in self.bit_depths:
            raise CodecError(f"{self.name} stream has a depth of {picture.depth} bits")
        margin = max(picture.coded_width - picture.width, picture.coded_height - picture.height)
        if margin > _LARGEST_MARGIN:
            raise CodecError(
                f"{self.name} stream cuts a picture of {picture.width}x{picture.height} samples "
                f"out of {picture.coded_width}x{picture.coded_height}"
            )
        return picture

    def frame_size(self, payload: bytes) -> tuple[int, int]:
        picture = self._picture(payload)
        return picture.height, picture.width

    def check_parameters(self, settings: EncoderSettings) -> None:
        if not settings.encoder_params or self._missing_encoder():
            return
        params = tuple(settings.encoder_params.items())
        known = self.name, settings.preset, settings.bit_depth, params
        if known in _taken:
            return
        for name, value in params:
            if name in self.quantizer_params:
                raise ValueError(
                    f"encoder_params={{{name!r}: {value!r}}} with codec {self.name!r}: allowed: "
                    "other parameters, as the quantizer follows from bits, step or snr_db"
                )
            if self.separator and (self.separator in name + value or "=" in name):
                raise ValueError(
                    f"encoder_params={dict(params)!r} with codec {self.name!r}: allowed: one name "
                    f"and one value in each entry, without {self.separator!r}"
                )
        if reason := self._refusal(settings, params):
            alone = [(param, self._refusal(settings, (param,))) for param in params]
            wrong = [(*param, said) for param, said in alone if said]
            if wrong:
                name, value, reason = wrong[0]
                params = ((name, value),)
            raise ValueError(
                f"encoder_params={dict(params)!r} with codec {self.name!r}: allowed: what "
                f"{self.encoder} takes; it says: {reason}"
            )
        _taken.add(known)

    @abstractmethod
    def _refusal(
        self, settings: EncoderSettings, params: tuple[tuple[str, str], ...]
    ) -> str | None:
        """What the encoder says of parameters that it does not take, or None if it takes them."""

    def decode_frame(self, payload: bytes) -> tuple[NDArray[Any], int]:
        picture = self._picture(payload)
        return ffmpeg.decode_luma(
            self.decoder, payload, (picture.coded_height, picture.coded_width)
        )


class _LibraryCodec(VideoCodec):
    """A video codec whose encoder is in PyAV."""

    @abstractmethod
    def encoder_options(self, qp: int, settings: EncoderSettings) -> dict[str, str]:
        """FFmpeg's options for the encoder, `settings.encoder_params` among them."""

    def encode_frame(self, frame: NDArray[np.uint16], qp: int, settings: EncoderSettings) -> bytes:
        options = self.encoder_options(qp, settings)
        return ffmpeg.encode_with_pyav(self.encoder, options, frame, self.depth(settings))

    def _refusal(
        self, settings: EncoderSettings, params: tuple[tuple[str, str], ...]
    ) -> str | None:
        depth = self.depth(settings)
        qp = min(self.quantizer_steps(depth))
        plain = replace(settings, encoder_params={})
        changed = replace(settings, encoder_params=dict(params))
        usual = _complaints(self.encoder, self.encoder_options(qp, plain), depth)
        said = _complaints(self.encoder, self.encoder_options(qp, changed), depth)
        return "; ".join(line for line in said if line not in usual) or None


_PROBE_SIDE = 64
_taken: set[tuple[object, ...]] = set()  # parameters that encoders were found to take
_log_level = threading.Lock()


def _complaints(encoder: str, options: dict[str, str], depth: int) -> list[str]:
    """What is wrong with an encoder's options, by opening it: errors, warnings, unknown names.

    FFmpeg opens x264, x265 and SVT-AV1 although they refused an option, and says so in its log
    alone. What is read of a message is its level and whose it is; its words are for users. Options
    that nothing takes stay in the context.
    """
    av = ffmpeg.pyav()
    assert av is not None
    context = av.codec.CodecContext.create(encoder, "w")
    context.width = context.height = _PROBE_SIDE
    context.pix_fmt = ffmpeg.PIX_FMT[depth]
    context.time_base = context.framerate = 1
    context.thread_count = context.gop_size = 1
    context.options = options
    with _log_level, av.logging.Capture() as log:
        level, skips = av.logging.get_level(), av.logging.get_skip_repeated()
        av.logging.set_level(av.logging.WARNING)
        av.logging.set_skip_repeated(False)
        try:
            context.open()
        except (av.error.FFmpegError, ValueError) as error:
            said = [getattr(error, "strerror", None) or str(error)]
        else:
            said = [f"there is no option {name!r}" for name in context.options]
        finally:
            av.logging.set_skip_repeated(skips)
            av.logging.set_level(level)
    return [message.strip() for _, name, message in log if name == encoder] + said


def h26x_steps(depth: int, lowest: int, highest: int) -> dict[int, float]:
    """Step of each QP in units of samples of `depth` bits: 2^((QP − 4)/6) at 8 bits.

    H.264 clause 8.5, H.265 clause 8.6.3, H.266 clause 8.7.3. The QP is that of 8 bits: at more, a
    sample is worth less and a QP's step is as many samples more.
    """
    return {qp: 2.0 ** ((qp - 4) / 6 + depth - 8) for qp in range(lowest, highest + 1)}


def joined(parameters: Mapping[str, str]) -> str:
    """Parameters as x264, x265, SVT-AV1 and libvvenc take them in one option."""
    return ":".join(f"{key}={value}" for key, value in parameters.items())


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
        stream = ffmpeg.encode_with_program(self.encoder, arguments, "vvc", frame, 10)
        return _without_nal_units(stream, lambda header: header[1] >> 3 == _VVC_DELIMITER)

    def _refusal(
        self, settings: EncoderSettings, params: tuple[tuple[str, str], ...]
    ) -> str | None:
        gray = np.full((_PROBE_SIDE, _PROBE_SIDE), 512, np.uint16)
        try:
            self.encode_frame(gray, 30, replace(settings, encoder_params=dict(params)))
        except CodecError as error:
            return str(error).partition("\n")[0]
        return None


_VVC_DELIMITER = 20  # AUD_NUT, H.266 table 5
_H264_SEI = 6  # H.264 table 7-1
_START_CODE = re.compile(rb"\x00*\x00\x00\x01")


def _without_nal_units(stream: bytes, unwanted: Callable[[bytes], bool]) -> bytes:
    """An Annex B byte stream without those NAL units of whose header `unwanted` says so."""
    starts = list(_START_CODE.finditer(stream))
    ends = [match.start() for match in starts[1:]] + [len(stream)]
    return b"".join(
        stream[match.start() : end]
        for match, end in zip(starts, ends, strict=True)
        if not unwanted(stream[match.end() : match.end() + 2])
    )


class _H26x(_LibraryCodec):
    """What x264 and x265 have in common."""

    params_option: ClassVar[str]
    # Psychovisual tools spend bits where an eye would look; filters blur what they cannot know.
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
        """The number by which the encoder knows a QP."""
        return qp


class HEVC(_H26x):
    """H.265/HEVC: x265 and FFmpeg's decoder, both in PyAV."""

    name = "hevc"
    standard = "ITU-T H.265 | ISO/IEC 23008-2"
    encoder = "libx265"
    decoder = "hevc"
    lines = _HARDWARE_LINES
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
        # x264 signs every stream with its name and settings, 500 bytes of them.
        stream = super().encode_frame(frame, qp, settings)
        return _without_nal_units(stream, lambda header: header[0] & 31 == _H264_SEI)

    def encoder_qp(self, qp: int, depth: int) -> int:
        return qp + 6 * (depth - 8)  # x264 counts from the lowest QP of the bit depth


class AV1(_LibraryCodec):
    """AV1: SVT-AV1 and dav1d, both in PyAV."""

    name = "av1"
    standard = "AOMedia AV1 Bitstream & Decoding Process Specification"
    encoder = "libsvtav1"
    decoder = "libdav1d"
    lines = _HARDWARE_LINES
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


class VP9(_LibraryCodec):
    """VP9: libvpx and FFmpeg's decoder, both in PyAV."""

    name = "vp9"
    standard = "VP9 Bitstream & Decoding Process Specification"
    encoder = "libvpx-vp9"
    decoder = "vp9"
    lines = _HARDWARE_LINES
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
