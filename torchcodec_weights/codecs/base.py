"""What a codec is: independent tiles of floats in, independent bitstreams out.

A codec knows nothing of tensors, modules, checkpoints or rate targets. It gets normalized tiles
(near unit variance) and one quality knob, `step`, the quantization step in units of the tile's
standard deviation, and returns one payload per tile. A lossless one gets the bits of the weights as
they are, and has no knob.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.errors import CodecError as CodecError
from torchcodec_weights.errors import CodecUnavailableError as CodecUnavailableError
from torchcodec_weights.errors import RateError as RateError
from torchcodec_weights.tiling import frame_shape, to_frame

if TYPE_CHECKING:
    import torch

    from torchcodec_weights.codecs.decoder import Decoder, DeviceDecoder

FloatArray = NDArray[np.float32]
BitArray = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True)
class CodecInfo:
    """What can be done with one codec on this machine.

    Attributes:
        name: the name that `codec_weight_only` takes.
        standard: the standard behind it.
        lossy: False if decoding returns the exact input.
        encoder: name of the encoder, or None where it is missing.
        decoders: device type ("cpu", "cuda") to the name of the decoder used for it.
        missing: what is not there and what to install, or None.
    """

    name: str
    standard: str
    lossy: bool
    encoder: str | None
    decoders: Mapping[str, str]
    missing: str | None = None


@dataclass(frozen=True)
class EncoderSettings:
    """How to encode, apart from the step.

    Attributes:
        preset: one of the codec's `presets`, or None for its default.
        profile: one of the codec's `profiles`, or None for its default.
        bit_depth: bits per sample for codecs of samples, or None for the profile's default.
        encoder_params: raw parameters handed to the encoder as they are, after the preset's own.
        tile_shape: rows and columns of a tile, or None for whole rows.
        adaptive_steps: whether each tile has a step of its own.
    """

    preset: str | None = None
    profile: str | None = None
    bit_depth: int | None = None
    encoder_params: Mapping[str, str] = field(default_factory=dict)
    tile_shape: tuple[int, int] | None = None
    adaptive_steps: bool = False


@dataclass(frozen=True)
class EncodedTile:
    """One tile's bitstream.

    Attributes:
        payload: the bitstream, decodable alone.
        unit: what one decoded integer is worth, in units of the normalized tile.
    """

    payload: bytes
    unit: float


@dataclass(frozen=True)
class StoredMatrix:
    """A container with its header read and checked, its tiles not.

    Attributes:
        data: the whole container.
        offsets: uint64 (tiles,), where the payloads begin; their outlier sections follow them.
        payload_sizes, outlier_sizes: uint32 (tiles,), bytes.
        crcs: uint32 (tiles,), CRC-32C over both.
        units: float32 (tiles,).
        rows, cols: shape of the matrix; tile i of n begins at row ⌊i · rows / n⌋.
        row_scale, col_scale: float32 (rows,) or (1,) and (cols,) or (1,).
        zero_point: float32 (rows,) or None.
        dtype: of the outliers' values.
        private: what `prepare` returned.
    """

    data: memoryview
    offsets: NDArray[np.uint64]
    payload_sizes: NDArray[np.uint32]
    outlier_sizes: NDArray[np.uint32]
    crcs: NDArray[np.uint32]
    units: FloatArray
    rows: int
    cols: int
    row_scale: FloatArray
    col_scale: FloatArray
    zero_point: FloatArray | None
    dtype: str
    private: bytes


@dataclass(frozen=True)
class RateCurve:
    """Rate of unit-variance Gaussian tiles against the step, piecewise linear.

    Attributes:
        log2_step: base-2 logarithms of the step, increasing.
        bits: payload bits per weight at each, decreasing.
    """

    log2_step: tuple[float, ...]
    bits: tuple[float, ...]

    def rate(self, log2_step: float) -> float:
        """Bits per weight at a step; continued with the end slopes outside the table."""
        return _interpolate(log2_step, self.log2_step, self.bits)

    def log2_step_for(self, bits: float) -> float:
        """The inverse of `rate`."""
        return _interpolate(bits, self.bits[::-1], self.log2_step[::-1])


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    i = int(np.clip(np.searchsorted(xs, x) - 1, 0, len(xs) - 2))
    return ys[i] + (x - xs[i]) * (ys[i + 1] - ys[i]) / (xs[i + 1] - xs[i])


class BaseCodec(ABC):
    """What lossy and lossless codecs have in common.

    Attributes:
        name: what users call it, and what the container records.
        presets: allowed values of `preset`.
        default_preset: the one taken where none is given.
        profiles: allowed values of `profile`, the default first; empty where there is no choice.
        bit_depths: allowed values of `bit_depth`; empty where there is no choice.
        tile_weights: how many weights a tile should have, about.
        adapts_steps: whether tiles may differ in their step.
        takes_parameters: whether the encoder has parameters of its own (`encoder_params`).
        decodes_whole: whether `decode_tiles` is there, for codecs so fast that Python's part for
            each tile would count.
    """

    name: ClassVar[str]
    presets: ClassVar[tuple[str, ...]] = ()
    default_preset: ClassVar[str | None] = None
    profiles: ClassVar[tuple[str, ...]] = ()
    bit_depths: ClassVar[tuple[int, ...]] = ()
    tile_weights: ClassVar[int] = 2**18
    adapts_steps: ClassVar[bool] = False
    takes_parameters: ClassVar[bool] = True
    decodes_whole: ClassVar[bool] = False

    @abstractmethod
    def info(self) -> CodecInfo:
        """What is there on this machine. Must not raise where packages are missing."""

    def weights_per_tile(self, cols: int) -> int:
        """How many weights a tile of a matrix of `cols` columns should have, about."""
        return self.tile_weights

    def decoders(self, device: "torch.device") -> "Sequence[Decoder]":
        """Decoders of its own for a device, the best first, whether they are there or not.

        The CPU's is not among them, nor is what a `SampleCodec` has in `device_decoder`.
        """
        return ()

    def decode_tiles(
        self, matrix: StoredMatrix, tiles: range, out: int, dtype: str, threads: int
    ) -> None:
        """Decode consecutive tiles, checksums, scales and outliers included, if `decodes_whole`.

        Args:
            tiles: which; their rows follow each other in `out`.
            out: address of room for their rows in `dtype`.
            dtype: "float32", "float16" or "bfloat16".
            threads: how many to use.

        Raises:
            CodecError: a tile is corrupt.
        """
        raise NotImplementedError

    def validate(self, settings: EncoderSettings) -> None:
        """Reject settings that this codec does not have.

        Raises:
            ValueError: names the argument, its value and what is allowed.
        """
        for argument, value, allowed in (
            ("preset", settings.preset, self.presets),
            ("profile", settings.profile, self.profiles),
            ("bit_depth", settings.bit_depth, self.bit_depths),
        ):
            if value is not None and value not in allowed:
                choice = ", ".join(map(repr, allowed)) if allowed else "nothing to choose"
                raise ValueError(
                    f"{argument}={value!r} with codec {self.name!r}: allowed: {choice}"
                )
        if settings.adaptive_steps and not self.adapts_steps:
            raise ValueError(
                f"tile_steps='adaptive' with codec {self.name!r}: allowed: 'uniform', as its tiles "
                "share one step"
            )
        if settings.tile_shape is not None and isinstance(self, LosslessCodec):
            raise ValueError(
                f"tile_shape={settings.tile_shape} with codec {self.name!r}: allowed: None"
            )

    def check_parameters(self, settings: EncoderSettings) -> None:
        """Reject `encoder_params` that the encoder does not take.

        Apart from `validate`, as a configuration that is stored with a model is validated wherever
        the model is loaded, with another version of the encoder or with none.

        Raises:
            ValueError: names the parameter, its value and what is allowed.
        """
        if settings.encoder_params and not self.takes_parameters:
            raise ValueError(
                f"encoder_params={dict(settings.encoder_params)!r} with codec {self.name!r}: "
                "allowed: none, as its encoder has no parameters but preset"
            )

    def require(self, *, encoder: bool) -> None:
        """Raise where this codec cannot encode (or decode) here.

        Raises:
            CodecUnavailableError: names the package to install.
        """
        info = self.info()
        if (info.encoder is None) if encoder else ("cpu" not in info.decoders):
            raise CodecUnavailableError(f"codec {self.name!r} is not available: {info.missing}")


class Codec(BaseCodec):
    """Base class of lossy codecs; see docs/adding_a_codec.md.

    Attributes:
        decodes_whole: of a lossy codec it says that `multiply_tiles` is there too.
        outlier_threshold: weights beyond this many standard deviations are taken out before
            encoding and stored exactly; None if the codec handles them itself.
    """

    outlier_threshold: ClassVar[float | None] = None

    @abstractmethod
    def rate_curve(self, settings: EncoderSettings) -> RateCurve:
        """Where rate control starts its search."""

    @abstractmethod
    def step_range(self, peak: float, settings: EncoderSettings) -> tuple[float, float]:
        """The finest and the coarsest step that tiles with values in ±`peak` can be coded with."""

    def prepare(self, tiles: Sequence[FloatArray], step: float, settings: EncoderSettings) -> bytes:
        """Private data that all tiles of a matrix share (entropy tables, say), as stored."""
        return b""

    @abstractmethod
    def encode(
        self,
        tile: FloatArray,
        step: float,
        peak: float,
        private: bytes,
        settings: EncoderSettings,
    ) -> EncodedTile:
        """Encode a tile. Must release the GIL for most of its time: tiles encode in parallel.

        Args:
            tile: (rows, cols), finite, within ±peak.
            step: quantization step in units of the matrix's standard deviation.
            peak: bound on the magnitude of every value of the matrix.
            private: what `prepare` returned.
            settings: validated by `validate`.

        Raises:
            CodecError: the encoder failed.
        """

    @abstractmethod
    def decode(
        self, payload: bytes, unit: float, private: bytes, shape: tuple[int, int], out: FloatArray
    ) -> None:
        """Decode one tile of `shape` (rows, cols) into `out` (rows, cols), C-contiguous.

        Must release the GIL for most of its time: tiles decode in parallel threads.

        Raises:
            CodecError: the payload cannot be decoded or does not fit `shape`.
        """

    def multiply_tiles(
        self,
        matrix: StoredMatrix,
        tiles: range,
        scaled: FloatArray,
        product: FloatArray,
        threads: int,
    ) -> None:
        """Multiply by consecutive tiles without storing them, if `decodes_whole`: x · Wᵀ.

        Args:
            tiles: which; of the product, only what their rows give is written.
            scaled: float32 (tokens, cols), C-contiguous: x with columns multiplied by their scales.
            product: float32 (tokens, rows), C-contiguous; without the zero points' part.
            threads: how many to use.

        Raises:
            CodecError: a tile is corrupt.
        """
        raise NotImplementedError


class LosslessCodec(BaseCodec):
    """Base class of codecs that return every bit. They decode whole matrices (`decode_tiles`)."""

    takes_parameters = False
    decodes_whole = True

    @abstractmethod
    def prepare_bits(self, tiles: Sequence[BitArray], dtype: str) -> bytes:
        """Private data that all tiles of a matrix share, as stored."""

    @abstractmethod
    def encode_bits(
        self, tile: BitArray, dtype: str, private: bytes
    ) -> tuple[bytes, NDArray[np.int64]]:
        """Encode a tile. Must release the GIL for most of its time: tiles encode in parallel.

        Args:
            tile: (rows, cols), C-contiguous, the bits of weights of `dtype`.
            dtype: "float32", "float16" or "bfloat16".
            private: what `prepare_bits` returned.

        Returns:
            The payload, and the row-major positions of weights, increasing, that are to be stored
            as outliers.

        Raises:
            CodecError: the encoder failed.
        """


class FrameDecoder(Protocol):
    """Decodes a stream in place of this process (`isolation.isolated_decoders`)."""

    def __call__(
        self, codec: "SampleCodec", payload: bytes, size: tuple[int, int]
    ) -> tuple[NDArray[Any], int]:
        """What `codec.decode_frame(payload)` returns: a frame of `size` (height, width), its depth.

        Raises:
            CodecError: the stream was not decoded.
        """


_LARGEST_BLOCK = 64  # samples of a side that a coded picture is made a multiple of


def _coded_samples(size: tuple[int, int]) -> int:
    """Samples of a frame (height, width) in whole blocks."""
    height, width = (-(-side // _LARGEST_BLOCK) * _LARGEST_BLOCK for side in size)
    return height * width


class SampleCodec(Codec):
    """A codec of pictures: tiles become frames of integer samples, lossy by a quantizer.

    The standards' quantizers have steps some 12 % apart, too coarse to hit a rate. So a step is
    made of two: the largest integer quantizer that keeps the whole range within the samples, and
    the affine scale between values and samples that turns it into the exact step.

    Attributes:
        device_decoder: what decodes its streams on CUDA devices, None if nothing does.
        frame_decoder: what decodes the streams of all codecs on the CPU, None for this process.
    """

    adapts_steps = True
    device_decoder: ClassVar["DeviceDecoder | None"] = None
    frame_decoder: ClassVar[FrameDecoder | None] = None

    @abstractmethod
    def frame_size(self, payload: bytes) -> tuple[int, int]:
        """Height and width of the frame that a stream announces, read without the decoder.

        It is asked before a decoder allocates what is announced, of bytes that may be anything. So
        it must see what the decoder would see, and that there is one frame.

        Raises:
            CodecError: not a stream as this codec's encoder writes it, or more than one frame.
        """

    def check_header(self, payload: bytes, shape: tuple[int, int]) -> tuple[int, int]:
        """Reject a stream by its headers, before a decoder allocates what they announce.

        Returns:
            Height and width that they announce.

        Raises:
            CodecError: it cannot be of a tile of `shape` (rows, columns).
        """
        size = self.frame_size(payload)
        if _coded_samples(size) > _coded_samples(frame_shape(shape[0] * shape[1], shape[1])):
            raise CodecError(
                f"{self.name} stream holds a frame of {size[1]}x{size[0]} samples, "
                f"too many for a tile of {shape[0]}x{shape[1]} weights"
            )
        self.check_size(size, shape)
        return size

    @abstractmethod
    def depth(self, settings: EncoderSettings) -> int:
        """Bits per sample that `settings` ask for."""

    @abstractmethod
    def quantizer_steps(self, depth: int) -> Mapping[int, float]:
        """Quantizer parameter to its step in sample units, for those that may be used."""

    @abstractmethod
    def encode_frame(self, frame: NDArray[np.uint16], qp: int, settings: EncoderSettings) -> bytes:
        """Encode a luma frame (height, width) to a stream of its own."""

    @abstractmethod
    def decode_frame(self, payload: bytes) -> tuple[NDArray[Any], int]:
        """Decode one stream: samples (height, width), uint8, uint16 or float32, and their depth.

        Its header has been checked. The depth is in bits.

        Raises:
            CodecError: the stream cannot be decoded.
        """

    def decode_checked(self, payload: bytes, size: tuple[int, int]) -> tuple[NDArray[Any], int]:
        """`decode_frame`, in a process of its own where `isolated_decoders` says so.

        Args:
            size: height and width that `check_header` returned.

        Raises:
            CodecError: the stream cannot be decoded, or to another size.
        """
        elsewhere = SampleCodec.frame_decoder
        if elsewhere is not None:
            return elsewhere(self, payload, size)
        frame, depth = self.decode_frame(payload)
        if frame.shape != size:
            raise CodecError(
                f"{self.name} stream announces a frame of {size[1]}x{size[0]} samples and decodes "
                f"to {frame.shape}"
            )
        return frame, depth

    def sample_scale(
        self, step: float, peak: float, settings: EncoderSettings
    ) -> tuple[int, float]:
        """The quantizer parameter and the samples per unit that make up `step`."""
        depth = self.depth(settings)
        limit = (2 ** (depth - 1) - 1) / max(peak, 1e-6)
        steps = self.quantizer_steps(depth)
        usable = [qp for qp, size in steps.items() if size / step <= limit]
        qp = max(usable, key=steps.__getitem__) if usable else min(steps, key=steps.__getitem__)
        return qp, min(steps[qp] / step, limit)

    def step_range(self, peak: float, settings: EncoderSettings) -> tuple[float, float]:
        depth = self.depth(settings)
        limit = (2 ** (depth - 1) - 1) / max(peak, 1e-6)
        sizes = self.quantizer_steps(depth).values()
        # Below one sample per standard deviation, rounding to samples would add to the step.
        return min(sizes) / limit, max(sizes)

    def encode(
        self,
        tile: FloatArray,
        step: float,
        peak: float,
        private: bytes,
        settings: EncoderSettings,
    ) -> EncodedTile:
        qp, scale = self.sample_scale(step, peak, settings)
        unit = float(np.float32(1.0 / scale))
        frame = to_frame(tile, unit, self.depth(settings))
        return EncodedTile(self.encode_frame(frame, qp, settings), unit)

    def check_size(self, frame: Sequence[int], shape: tuple[int, int]) -> None:
        """Reject a frame (height, width) with fewer samples than a tile of `shape` has weights.

        Raises:
            CodecError: it is too small.
        """
        if frame[0] * frame[1] < shape[0] * shape[1]:
            raise CodecError(
                f"{self.name} stream holds a frame of {frame[1]}x{frame[0]} samples, "
                f"too few for a tile of {shape[0]}x{shape[1]} weights"
            )

    def decode(
        self, payload: bytes, unit: float, private: bytes, shape: tuple[int, int], out: FloatArray
    ) -> None:
        frame, depth = self.decode_checked(payload, self.check_header(payload, shape))
        count = shape[0] * shape[1]
        flat = out.reshape(-1)
        width = frame.shape[1]
        full = count // width
        np.subtract(
            frame[:full],
            np.float32(2 ** (depth - 1)),
            out=flat[: full * width].reshape(full, width),
            dtype=np.float32,
            casting="unsafe",
        )
        if count > full * width:
            flat[full * width :] = frame[full, : count - full * width]
            flat[full * width :] -= 2 ** (depth - 1)
        flat *= np.float32(unit)
