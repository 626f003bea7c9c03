"""Base classes of codecs: independent tiles of floats in, independent bitstreams out.

A codec knows nothing of tensors, modules, checkpoints or rate targets. It gets normalized tiles
(near unit variance) and one quality parameter, `step`, the quantization step in units of the tile's
standard deviation, and returns one payload per tile. A lossless one gets the bits of the weights as
they are, and has no such parameter.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.records import (
    BitArray,
    CodecInfo,
    EncodedTile,
    EncoderSettings,
    ErrorFeedback,
    FloatArray,
    RateCurve,
    StoredMatrix,
)
from torchcodec_weights.errors import CodecUnavailableError
from torchcodec_weights.format.tiling import Window

if TYPE_CHECKING:
    import torch

    from torchcodec_weights.codecs.decoder import Decoder


class BaseCodec(ABC):
    """Base class of lossy and lossless codecs.

    Attributes:
        name: as users give it, and as the container stores it.
        presets: allowed values of `preset`.
        default_preset: the preset that is used if none is given.
        profiles: allowed values of `profile`, the default first; empty where there is no choice.
        bit_depths: allowed values of `bit_depth`; empty where there is no choice.
        tile_weights: about how many weights a tile should have.
        adapts_steps: whether tiles may differ in their step.
        takes_parameters: whether the encoder has parameters of its own (`encoder_params`).
        decodes_whole: whether the codec has `decode_tiles`; for codecs so fast that Python's
            overhead for each tile would matter.
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
        """Encoder and decoders on this machine. Must not raise if packages are missing."""

    def weights_per_tile(self, cols: int) -> int:
        """About how many weights a tile of a matrix of `cols` columns should have."""
        return self.tile_weights

    def decoders(self, device: "torch.device") -> "Sequence[Decoder]":
        """The codec's own decoders for a device, the best first, available here or not.

        Without the CPU's decoder and without a `SampleCodec`'s `device_decoder`.
        """
        return ()

    def decode_tiles(
        self, matrix: StoredMatrix, tiles: range, out: int, dtype: str, threads: int
    ) -> None:
        """Decode consecutive tiles, checksums, scales and outliers included, if `decodes_whole`.

        Args:
            tiles: indices of the tiles; their rows follow each other in `out`.
            out: address of a buffer for their rows in `dtype`.
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

        Not part of `validate`, because a configuration that is stored with a model is validated
        wherever the model is loaded, with another version of the encoder or without any.

        Raises:
            ValueError: names the parameter, its value and what is allowed.
        """
        if settings.encoder_params and not self.takes_parameters:
            raise ValueError(
                f"encoder_params={dict(settings.encoder_params)!r} with codec {self.name!r}: "
                "allowed: none, as its encoder has no parameters but preset"
            )

    def require(self, *, encoder: bool) -> None:
        """Raise if this codec cannot encode (or decode) on this machine.

        Raises:
            CodecUnavailableError: names the package to install.
        """
        info = self.info()
        if (info.encoder is None) if encoder else ("cpu" not in info.decoders):
            raise CodecUnavailableError(f"codec {self.name!r} is not available: {info.missing}")


class Product(ABC):
    """A weight that is prepared to be multiplied by on the CPU, without being stored.

    Threads may share it.
    """

    @abstractmethod
    def __call__(
        self, x: int, dtype: int, tokens: int, bias: int | None, y: int, threads: int
    ) -> None:
        """Compute x · Wᵀ + bias with sums of float32, rounded once.

        Args:
            x: address of (tokens, columns of the weight), C-contiguous.
            dtype: of x, bias and y, a value of `DTYPE_CODES`.
            bias: address of (rows of the weight,), or None.
            y: address of (tokens, rows of the weight), written.
            threads: how many to use.

        Raises:
            CodecError: a tile is corrupt.
        """


class Codec(BaseCodec):
    """Base class of lossy codecs; see docs/adding_a_codec.md.

    Attributes:
        decodes_whole: whether the codec has `decode_tiles` and `product`.
        outlier_threshold: weights beyond this many standard deviations are taken out before
            encoding and stored exactly; None if the codec handles them itself.
        outlier_steps: the same where the importance of rows and columns is known, in steps.
        even_rows: whether rows of different importance are scaled half way to one variance, for
            encoders that would drop most of a row of little importance otherwise.
        feeds_back: whether the encoder carries errors across columns and takes tables by class:
            `prepare_columns`, `encode_columns` and `estimate_columns`.
    """

    outlier_threshold: ClassVar[float | None] = None
    outlier_steps: ClassVar[float] = 40.0
    even_rows: ClassVar[bool] = True
    feeds_back: ClassVar[bool] = False

    def codes_columns(self, cols: int) -> bool:
        """Whether a matrix of `cols` columns is to be coded by columns; only if `feeds_back`."""
        return self.feeds_back

    def weights_per_column_tile(self, cols: int) -> int:
        """As `weights_per_tile`, for tiles that are coded by columns; if `feeds_back`."""
        return self.weights_per_tile(cols)

    @abstractmethod
    def rate_curve(self, settings: EncoderSettings) -> RateCurve:
        """Where rate control starts its search."""

    @abstractmethod
    def step_range(self, peak: float, settings: EncoderSettings) -> tuple[float, float]:
        """The finest and the coarsest step that tiles with values in ±`peak` can be coded with."""

    def prepare(self, tiles: Sequence[FloatArray], step: float, settings: EncoderSettings) -> bytes:
        """Private data that all tiles of a matrix share, for example entropy tables, as stored."""
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
            StepTooFineError: as it cannot write so much; coarser steps are tried then.
        """

    def prepare_columns(
        self,
        tiles: Sequence[FloatArray],
        step: float,
        settings: EncoderSettings,
        feedback: ErrorFeedback | None,
    ) -> bytes:
        """Private data that all tiles of a matrix share, for `encode_columns`; if `feeds_back`.

        Args:
            tiles: all of the matrix in whole rows, float32 (rows, cols) each, finite, columns in
                the coded order, outliers 0. They need no unit variance, and columns may differ.
            step: quantization step in units of the tiles.
            settings: validated by `validate`.
            feedback: how errors are carried across columns; None if they are not.

        Raises:
            ValueError: the feedback does not fit the columns.
            StepTooFineError: weights lie beyond the codec's levels; coarser steps are tried then.
        """
        raise NotImplementedError

    def encode_columns(
        self,
        tile: FloatArray,
        step: float,
        private: bytes,
        settings: EncoderSettings,
        feedback: ErrorFeedback | None,
    ) -> EncodedTile:
        """Encode a tile column by column, errors carried into later columns; if `feeds_back`.

        Must release the GIL for most of its time: tiles encode in parallel.

        Args:
            tile: (rows, cols), one of those that `prepare_columns` got.
            step: as `prepare_columns` got it.
            private: what it returned.
            settings: as `prepare_columns` got them.
            feedback: as `prepare_columns` got it.
        """
        raise NotImplementedError

    def estimate_columns(
        self,
        tiles: Sequence[FloatArray],
        step: float,
        settings: EncoderSettings,
        feedback: ErrorFeedback | None,
    ) -> float:
        """Bits per weight of all payloads that `encode_columns` would write; if `feeds_back`.

        From a sample of rows, so that a step can be searched for. Arguments and errors are those of
        `prepare_columns`.
        """
        raise NotImplementedError

    @abstractmethod
    def decode(
        self, payload: bytes, unit: float, private: bytes, shape: tuple[int, int], out: FloatArray
    ) -> None:
        """Decode one tile of `shape` (rows, cols) into `out` (rows, cols), C-contiguous.

        Must release the GIL for most of its time: tiles decode in parallel threads.

        Raises:
            CodecError: the payload cannot be decoded or does not fit `shape`.
        """

    def product(self, matrix: StoredMatrix, tiles: range, window: Window) -> Product:
        """Prepare a product by some rows and columns of a matrix, if `decodes_whole`.

        Args:
            tiles: indices of the tiles that hold the rows of `window`.

        Raises:
            CodecError: the matrix's private data is malformed.
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
