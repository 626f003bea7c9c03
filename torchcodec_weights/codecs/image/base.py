"""Image codecs: a tile is one grayscale picture. Encoders and decoders are those of imagecodecs.

White noise gains nothing from a transform, or from quantizers optimized for the eye. So each codec
uses only a uniform quantizer and the entropy coder of its standard. Except in JPEG, the samples are
the rounded weights, coded without loss, and without wavelets if possible.

docs/codecs.md has measurements of the gain.
"""

from collections.abc import Callable
from functools import cache
from math import erf, pi, sqrt
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.pictures import SampleCodec
from torchcodec_weights.codecs.records import (
    CodecInfo,
    EncodedTile,
    EncoderSettings,
    FloatArray,
    RateCurve,
)
from torchcodec_weights.errors import CodecError, CodecUnavailableError

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
    """The factor on decoded values that minimizes the error of unit-variance Gaussian tiles.

    Uniform rounding makes values larger on average, as its error is uncorrelated to the value
    before, not after. At 2 bits the factor is 0.92, and worth 0.3 dB.

    Args:
        step: of uniform rounding.
        reconstruction: takes positive levels, returns their decoded values, in steps.
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
        """Decoded values of positive levels, in steps."""
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
            CodecError: the result is not such a picture.
        """
        frame: NDArray[Any] = self.call(function, payload, **options)
        if frame.ndim != 2 or frame.dtype not in (np.uint8, np.uint16):
            raise CodecError(f"{self.name} stream decodes to {frame.dtype} {frame.shape}")
        return frame
