"""Video codecs: a tile is an all-intra frame, luma only.

The presets are our own: each gives the encoder's options for weights, which are noise. On noise, a
search of block sizes and prediction modes gains next to nothing and takes most of an encoder's
time, so the faster presets omit it. docs/codecs.md has the measurements behind every option.
"""

import threading
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.pictures import SampleCodec
from torchcodec_weights.codecs.records import CodecInfo, EncoderSettings, RateCurve
from torchcodec_weights.codecs.video import ffmpeg
from torchcodec_weights.codecs.video.picture import Picture, read_picture
from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.tiling import frame_width

# NVDEC takes no HEVC picture of less than 144 lines, and no VP9 or AV1 picture of less than 128. A
# tile may have three quarters of the weights that it should have.
HARDWARE_LINES = 192
_LARGEST_MARGIN = 64  # samples, to a multiple of the smallest coding block
_taken: set[tuple[object, ...]] = set()  # parameters that encoders have accepted
PROBE_SIDE = 64
_log_level = threading.Lock()


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
        lines: least number of lines that the picture of a tile should have; 0 for any number.
        quantizer_params: names of the encoder's parameters that set the quantizer.
        separator: separates parameters if the encoder takes all of them in one option, else "".
    """

    standard: ClassVar[str]
    encoder: ClassVar[str]
    decoder: ClassVar[str]
    table: ClassVar[Mapping[str, Preset]]
    # A weight beyond five deviations costs more bits in a transform block than as an outlier.
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
        """Why the encoder is not available, or None if it is."""
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

    def read_header(self, payload: bytes) -> Picture:
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
        """The encoder's message about parameters that it refuses, or None if it accepts them."""

    def decode_frame(self, payload: bytes) -> tuple[NDArray[Any], int]:
        picture = self.read_header(payload)
        return ffmpeg.decode_luma(
            self.decoder, payload, (picture.coded_height, picture.coded_width)
        )


class LibraryCodec(VideoCodec):
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


def _complaints(encoder: str, options: dict[str, str], depth: int) -> list[str]:
    """Errors, warnings and unknown names that an encoder reports when it is opened with options.

    FFmpeg opens x264, x265 and SVT-AV1 even if they refuse an option, and reports that only in its
    log. Messages are selected by level and by encoder; their text is passed on to users. Options
    that no component accepts remain in the context.
    """
    av = ffmpeg.pyav()
    assert av is not None
    context = av.codec.CodecContext.create(encoder, "w")
    context.width = context.height = PROBE_SIDE
    context.pix_fmt = ffmpeg.PIX_FMT[depth]
    context.time_base = context.framerate = 1
    context.thread_count = context.gop_size = 1
    context.options = options
    with _log_level, av.logging.Capture() as log:
        level, skips = av.logging.get_level(), av.logging.get_skip_repeated()
        av.logging.set_level(av.logging.WARNING)
        av.logging.set_skip_repeated(False)
        try:
            ffmpeg.open_encoder(context)
        except (av.error.FFmpegError, ValueError) as error:
            said = [getattr(error, "strerror", None) or str(error)]
        else:
            said = [f"there is no option {name!r}" for name in context.options]
        finally:
            av.logging.set_skip_repeated(skips)
            av.logging.set_level(level)
    return [message.strip() for _, name, message in log if name == encoder] + said


def joined(parameters: Mapping[str, str]) -> str:
    """Parameters as x264, x265, SVT-AV1 and libvvenc take them in one option."""
    return ":".join(f"{key}={value}" for key, value in parameters.items())
