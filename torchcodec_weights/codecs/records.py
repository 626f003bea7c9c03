"""Arguments and results of codecs: settings, tiles, matrices, rate curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
BitArray = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True)
class CodecInfo:
    """What one codec can do on this machine.

    Attributes:
        name: the name that `codec_weight_only` takes.
        standard: the standard behind it.
        lossy: False if decoding returns the exact input.
        encoder: name of the encoder, or None where it is missing.
        decoders: device type ("cpu", "cuda") to the name of the decoder used for it.
        missing: which package is missing and how to install it, or None.
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
    """A container whose header has been read and checked; its tiles have not.

    Attributes:
        data: the whole container.
        offsets: uint64 (tiles,), where the payloads begin; their outlier sections follow them.
        payload_sizes, outlier_sizes: uint32 (tiles,), bytes.
        crcs: uint32 (tiles,), CRC-32C over both.
        units: float32 (tiles,).
        rows, cols: shape of the matrix; tile i of n begins at row ⌊i · rows / n⌋.
        row_scale, col_scale: float32 (rows,) or (1,) and (cols,) or (1,).
        column_order: uint32 (cols,), the column that lies at each position of the coded order; None
            where columns lie in their own order.
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
    column_order: NDArray[np.uint32] | None = None


@dataclass(frozen=True, eq=False)
class ErrorFeedback:
    """How the error of a quantized column is made up for by the columns that follow.

    When column j = order[i] is quantized with the error e = z_j − ẑ_j, every column k that comes
    later gets z_k −= e · factors[j, k]: GPTQ (Frantar et al., arXiv 2210.17323), LDLQ (Chee et al.,
    arXiv 2307.13304).

    Attributes:
        factors: float32 (cols, cols), by positions in the coded order.
        order: uint32 (cols,), positions in the order in which they are quantized.
    """

    factors: FloatArray
    order: NDArray[np.uint32]


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
