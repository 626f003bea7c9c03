"""Image codecs: a tile is one grayscale picture. Encoders and decoders are those of imagecodecs.

White noise gains nothing from a transform or from steps made for the eye. Of each standard only
what does well on noise is used: one uniform quantizer, then the standard's entropy coder. But for
JPEG, the samples are the rounded weights, coded without loss, without wavelets where possible.

docs/codecs.md has what that gains.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil, erf, pi, sqrt
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.base import (
    CodecInfo,
    EncodedTile,
    EncoderSettings,
    FloatArray,
    RateCurve,
    SampleCodec,
)
from torchcodec_weights.codecs.headers import jpeg, jpegxl
from torchcodec_weights.errors import CodecError, CodecUnavailableError
from torchcodec_weights.tiling import to_frame

INSTALL = "imagecodecs is not installed: pip install 'torchcodec-weights[image]'"


@cache
def imagecodecs() -> ModuleType | None:
    """The module `imagecodecs`, or None where it cannot be imported."""
    try:
        import imagecodecs
    except ImportError:
        return None
    module: ModuleType = imagecodecs
    return module


def gaussian_gain(
    step: float, reconstruction: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> float:
    """The factor on decoded values that makes the error of unit-variance Gaussian tiles smallest.

    Uniform rounding makes values larger on average, as its error is uncorrelated to the value
    before, not after. At 2 bits the factor is 0.92, and worth 0.3 dB.

    Args:
        step: of uniform rounding.
        reconstruction: positive levels to what the decoder makes of them, in steps.
    """
    edges = (np.arange(1, int(6 / step) + 3) - 0.5) * step
    density = np.exp(-edges * edges / 2) / sqrt(2 * pi)
    mass = np.diff([erf(edge / sqrt(2)) / 2 for edge in edges])
    values = reconstruction(np.arange(1.0, len(edges))) * step
    return float(-(values * np.diff(density)).sum() / (values * values * mass).sum())


class ImageCodec(SampleCodec):
    """An image codec by its standard and the library that imagecodecs has for it.

    Attributes:
        standard: number of the standard.
        library: the library that encodes and decodes.
        extension: imagecodecs' name for its interface to that library.
        curve: payload rate of 512 × 512 Gaussian tiles (benchmarks/rate_curve.py prints it).
    """

    standard: ClassVar[str]
    library: ClassVar[str]
    extension: ClassVar[str]
    curve: ClassVar[RateCurve]
    outlier_threshold = 5.0  # as in the video codecs: the range of samples is bounded
    _COARSEST: ClassVar[float] = 4.0  # some 0.3 bits

    def info(self) -> CodecInfo:
        module = imagecodecs()
        name = f"{self.library} (imagecodecs)"
        missing = INSTALL if module is None else None
        if module is not None and not getattr(module, self.extension).available:
            missing = f"imagecodecs lacks {self.library}"
        return CodecInfo(
            name=self.name,
            standard=self.standard,
            lossy=True,
            encoder=None if missing else name,
            decoders={} if missing else {"cpu": name},
            missing=missing,
        )

    def validate(self, settings: EncoderSettings) -> None:
        super().validate(settings)
        if settings.encoder_params:
            raise ValueError(
                f"encoder_params={dict(settings.encoder_params)!r} with codec {self.name!r}: "
                "allowed: nothing to choose"
            )

    def rate_curve(self, settings: EncoderSettings) -> RateCurve:
        return self.curve

    def step_range(self, peak: float, settings: EncoderSettings) -> tuple[float, float]:
        return super().step_range(peak, settings)[0], self._COARSEST

    def encode(
        self,
        tile: FloatArray,
        step: float,
        peak: float,
        private: bytes,
        settings: EncoderSettings,
    ) -> EncodedTile:
        coded = super().encode(tile, step, peak, private, settings)
        gain = gaussian_gain(step, self.reconstruction)
        return EncodedTile(coded.payload, float(np.float32(coded.unit * gain)))

    def reconstruction(self, levels: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the decoder makes of positive levels, in steps."""
        return levels

    def call(self, function: str, *arguments: Any, **options: Any) -> Any:
        """Call a function of imagecodecs.

        Raises:
            CodecUnavailableError: it is not installed.
            CodecError: the function failed.
        """
        module = imagecodecs()
        if module is None:
            raise CodecUnavailableError(INSTALL)
        try:
            return getattr(module, function)(*arguments, **options)
        except (RuntimeError, ValueError) as error:
            raise CodecError(f"{self.library} failed: {error}") from error

    def decoded(self, function: str, payload: bytes, **options: Any) -> NDArray[Any]:
        """Decode a stream of one gray picture: samples (height, width).

        Raises:
            CodecError: anything else comes out.
        """
        frame: NDArray[Any] = self.call(function, payload, **options)
        if frame.ndim != 2 or frame.dtype not in (np.uint8, np.uint16):
            raise CodecError(f"{self.name} stream decodes to {frame.dtype} {frame.shape}")
        return frame


def _dct() -> FloatArray:
    """The DCT of 8 × 8 blocks (T.81 clause A.3.3) as a matrix (64, 64); it is orthonormal."""
    n = np.arange(8)
    rows = 0.5 * np.cos((2 * n + 1) * n[:, None] * pi / 16)
    rows[0] /= sqrt(2)
    return np.kron(rows, rows).astype(np.float32)


def _zigzag() -> list[int]:
    """Row-major index of each coefficient in zigzag order, T.81 figure A.6."""

    def place(index: int) -> tuple[int, int]:
        row, column = divmod(index, 8)
        return row + column, row if (row + column) % 2 else column

    return sorted(range(64), key=place)


_DCT = _dct()
_ZIGZAG = _zigzag()
# Markers, T.81 table B.1.
_SOI, _SOF0, _SOF1, _SOS, _DQT, _APP0 = b"\xff\xd8", 0xC0, 0xC1, 0xDA, 0xDB, 0xE0


def _segments(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and what follows the length, for each segment of a JPEG stream.

    The last is the scan, whose entropy-coded data is taken with it.

    Raises:
        CodecError: not such a sequence.
    """
    position = 2
    while stream[:2] == _SOI and len(stream) >= position + 4 and stream[position] == 0xFF:
        marker = stream[position + 1]
        end = position + 2 + int.from_bytes(stream[position + 2 : position + 4], "big")
        if marker == _SOS:
            yield marker, stream[position + 4 :]
            return
        yield marker, stream[position + 4 : end]
        position = end
    raise CodecError("jpeg stream has no scan")


class JPEG(ImageCodec):
    """JPEG, baseline: libjpeg-turbo with coefficients and a quantization table of our own.

    libjpeg-turbo takes samples, not coefficients, and has a table made for the eye. So it is given
    the picture whose coefficients are our levels times its table, in 12 bits, which is so exact
    that it finds each level again. Then a flat table and a precision of 8 bits take the place of
    its own, which leaves a baseline stream with optimized Huffman tables.
    """

    name = "jpeg"
    standard = "ITU-T T.81 | ISO/IEC 10918-1"
    library = "libjpeg-turbo"
    extension = "JPEG8"
    curve = RateCurve(
        (-4.5, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0),
        (6.708, 6.202, 5.204, 4.24, 3.737, 3.242, 2.726, 2.256, 1.774, 1.324, 0.856, 0.364),
    )
    _SCAN_HEADER: ClassVar[int] = 8  # bytes, with its length, for one component
    _HALF: ClassVar[int] = 2**11

    def depth(self, settings: EncoderSettings) -> int:
        return 12  # 16 in 12 bits are one in 8

    def quantizer_steps(self, depth: int) -> Mapping[int, float]:
        return {entry: 16.0 * entry for entry in range(1, 256)}

    def encode_frame(self, frame: NDArray[np.uint16], qp: int, settings: EncoderSettings) -> bytes:
        height, width = frame.shape
        samples = frame.astype(np.float32) - self._HALF
        blocks = samples.reshape(height // 8, 8, width // 8, 8).swapaxes(1, 2).reshape(-1, 64)
        levels = np.rint(blocks @ (_DCT.T / np.float32(16 * qp)))
        quality = 50
        table = self._table(quality)
        peak = float(np.abs((levels * table) @ _DCT).max())
        if peak > 0:
            # The coarsest table with a picture within 12 bits, by jpeg_quality_scaling().
            factor = 0.95 * self._HALF / peak
            quality = ceil(100 - 50 * factor if factor < 1 else max(50 / factor, 1))
            table = self._table(quality)
        blocks = np.rint((levels * table) @ _DCT).reshape(height // 8, width // 8, 8, 8)
        picture = blocks.swapaxes(1, 2).reshape(height, width) + self._HALF
        picture = np.clip(picture, 0, 2 * self._HALF - 1).astype(np.uint16)
        stream = self.call("jpeg8_encode", picture, quality, bitspersample=12, optimize=True)
        return self._baseline(stream, qp)

    def _baseline(self, stream: bytes, entry: int) -> bytes:
        """A stream of 12 bits as one of 8 with the same levels, a flat table and no JFIF."""
        output = bytearray(_SOI)
        for marker, contents in _segments(stream):
            if marker == _APP0:
                continue
            length = self._SCAN_HEADER if marker == _SOS else 2 + len(contents)
            if marker == _SOF1:
                marker, contents = _SOF0, b"\x08" + contents[1:]
            elif marker == _DQT:
                contents = contents[:1] + bytes([entry]) * 64
            output += bytes([0xFF, marker]) + length.to_bytes(2, "big") + contents
        return bytes(output)

    @cache  # noqa: B019 - codecs are not collected
    def _table(self, quality: int) -> FloatArray:
        """libjpeg-turbo's table of a quality, row-major (64,)."""
        blank = np.full((8, 8), self._HALF, np.uint16)
        stream = self.call("jpeg8_encode", blank, quality, bitspersample=12)
        entries = next(contents for marker, contents in _segments(stream) if marker == _DQT)
        table = np.empty(64, np.float32)
        table[_ZIGZAG] = np.frombuffer(entries[1:65], np.uint8)
        return table

    def frame_size(self, payload: bytes) -> tuple[int, int]:
        return jpeg.read(payload)

    def decode_frame(self, payload: bytes) -> tuple[NDArray[Any], int]:
        return self.decoded("jpeg8_decode", payload).astype(np.uint16) << 4, 12


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

    VarDCT is what libjxl makes of a JPEG stream: a frame with the same coefficients. It is faster,
    and better where levels are so many that libjxl's adaptive trees cannot learn them from a tile.
    At low rates a language model suffers more from its error.

    Of a recompressed JPEG the codestream alone is kept, not the container with what would rebuild
    the JPEG file. Its header is changed to announce samples of 12 bits, to which libjxl then
    decodes: 8 would cost 3 dB at 6 bits.
    """

    name = "jpegxl"
    standard = "ISO/IEC 18181-1"
    library = "libjxl"
    extension = "JPEGXL"
    device_decoder = None
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

    def frame_size(self, payload: bytes) -> tuple[int, int]:
        image = jpegxl.read_image(payload)
        if image.depth not in (8, 12):
            raise CodecError(f"jpegxl stream has a depth of {image.depth} bits")
        jpegxl.check_frame(payload, image)
        return image.height, image.width

    def decode_frame(self, payload: bytes) -> tuple[NDArray[Any], int]:
        frame = self.decoded("jpegxl_decode", payload, numthreads=1)
        if frame.dtype == np.uint8:
            return frame, 8
        # White is 4095 in 12 bits and 255 in 8, of which one is worth 16 here.
        return frame * np.float32(16 * 255 / 4095), 12


def _codestream(container: bytes) -> bytes:
    """The codestream in a JPEG XL container, ISO/IEC 18181-2: boxes `jxlc`, or `jxlp` in order."""
    parts, position = [], 0
    while position < len(container):
        size = int.from_bytes(container[position : position + 4], "big") or len(container)
        kind = container[position + 4 : position + 8]
        if kind in (b"jxlc", b"jxlp"):
            skipped = 8 if kind == b"jxlc" else 12  # a part begins with its number
            parts.append(container[position + skipped : position + size])
        position += size
    return b"".join(parts)


class _JPEG2000Family(ImageCodec):
    """JPEG 2000's codestream: a weight is rounded to a sample, and samples are coded exactly.

    Attributes:
        function: stem of imagecodecs' names for the encoder and the decoder.
        headers: bits per sample to what follows SIZ in the main header. Nothing else is decoded:
            OpenJPH 0.26 crashes where a segment is shorter than the wavelet levels ask for.
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
        self.frame_size(output)  # what another version of the encoder writes is not decoded
        return bytes(output)

    def frame_size(self, payload: bytes) -> tuple[int, int]:
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
        part = b"\0\x0a\0\0" + max(length, 0).to_bytes(4, "big") + b"\0\1"
        if not payload.startswith(self._SOT + part + self._SOD, start) or not payload.endswith(
            self._EOC
        ):
            raise CodecError(f"{self.name} stream is not one tile-part to its end")
        return height, width

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

    imagecodecs has OpenJPH make at least one level of wavelets. So the picture is twice as wide and
    high, and made such that our frame is its low-pass band and the other bands are empty, which
    costs next to nothing. The frame is decoded as the picture at half its resolution; in the whole
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

    def frame_size(self, payload: bytes) -> tuple[int, int]:
        height, width = super().frame_size(payload)
        return -(-height // 2), -(-width // 2)

    def decode_frame(self, payload: bytes) -> tuple[NDArray[Any], int]:
        return self.decode_samples(payload, skipres=1)
