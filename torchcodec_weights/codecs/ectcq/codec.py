"""ECTCQ as a codec: entropy-coded trellis-coded quantization (docs/bitstream.md).

Marcellin and Fischer, "Trellis coded quantization of memoryless and Gauss–Markov sources", IEEE
Trans. Commun. 38, 1990; Fischer and Wang, "Entropy-constrained trellis-coded quantization", IEEE
Trans. Inf. Theory 38, 1992; Duda, "Asymmetric numeral systems", arXiv 1311.2540; Giesen,
"Interleaved entropy coders", arXiv 1402.3392.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from torchcodec_weights.codecs.base import Codec
from torchcodec_weights.codecs.common import compiled
from torchcodec_weights.codecs.ectcq import column_kernels, kernels
from torchcodec_weights.codecs.ectcq.column_training import estimate_bits, train_columns
from torchcodec_weights.codecs.ectcq.columns import (
    decoder_classes_of,
    is_by_columns,
    search_classes_of,
)
from torchcodec_weights.codecs.ectcq.decode import decode_tiles
from torchcodec_weights.codecs.ectcq.linear import LinearProduct
from torchcodec_weights.codecs.ectcq.model import MAX_LEVEL, EntropyModel, tables_of, train
from torchcodec_weights.codecs.records import (
    CodecInfo,
    EncodedTile,
    EncoderSettings,
    ErrorFeedback,
    FloatArray,
    RateCurve,
    StoredMatrix,
)
from torchcodec_weights.format.tiling import Window

if TYPE_CHECKING:
    import torch

    from torchcodec_weights.codecs.decoder import Decoder

_SAMPLE = 2**16
_COLUMN_TILE = 2**17
_COLUMN_TILE_ROWS = 192
"""Rows of a tile, or more: a trellis starts anew in each column of each tile."""


class ECTCQ(Codec):
    """Trellis-coded quantization with interleaved rANS: nearest to Shannon's limit, and fastest."""

    name = "ectcq"
    presets = ("fast", "medium", "best")
    default_preset = "best"
    # As few as a stream's first states, half a byte to a weight's lane, allow.
    tile_weights = 2**16
    outlier_threshold = 5.0
    outlier_steps = 60.0
    takes_parameters = False
    decodes_whole = True
    feeds_back = True

    _STATES: ClassVar[dict[str, int]] = {"fast": 8, "medium": 64, "best": 256}
    # Nearly the same for all three (benchmarks/rate_curve.py).
    _CURVE: ClassVar[RateCurve] = RateCurve(
        (-4.5, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5),
        (5.553, 5.051, 4.05, 3.049, 2.556, 2.068, 1.589, 1.119, 0.628),
    )

    def _states(self, settings: EncoderSettings) -> int:
        return self._STATES[settings.preset or self.default_preset]

    def info(self) -> CodecInfo:
        return compiled.info(self.name, lossy=True)

    def decoders(self, device: "torch.device") -> "Sequence[Decoder]":
        if device.type != "cuda":
            return ()
        from torchcodec_weights.codecs.ectcq.resident import KERNELS

        return (KERNELS,)

    def codes_columns(self, cols: int) -> bool:
        return -cols % kernels.LANES * kernels.LANES <= cols  # the rest of a group is coded too

    def weights_per_column_tile(self, cols: int) -> int:
        return max(_COLUMN_TILE, _COLUMN_TILE_ROWS * cols)

    def rate_curve(self, settings: EncoderSettings) -> RateCurve:
        return self._CURVE

    def step_range(self, peak: float, settings: EncoderSettings) -> tuple[float, float]:
        return max(peak, 1e-3) / (2 * MAX_LEVEL - 2), 4.0

    def prepare(self, tiles: Sequence[FloatArray], step: float, settings: EncoderSettings) -> bytes:
        peak = max(float(np.max(np.abs(tile))) for tile in tiles)
        unit = float(np.float32(step))
        return train(_sample(tiles), unit, peak, self._states(settings)).to_bytes()

    def encode(
        self,
        tile: FloatArray,
        step: float,
        peak: float,
        private: bytes,
        settings: EncoderSettings,
    ) -> EncodedTile:
        unit = float(np.float32(step))
        model, _ = _search_model(private, unit, peak)
        return EncodedTile(kernels.encode(model, tile), unit)

    def prepare_columns(
        self,
        tiles: Sequence[FloatArray],
        step: float,
        settings: EncoderSettings,
        feedback: ErrorFeedback | None,
    ) -> bytes:
        unit = float(np.float32(step))
        return train_columns(tiles, unit, self._states(settings), feedback).to_bytes()

    def encode_columns(
        self,
        tile: FloatArray,
        step: float,
        private: bytes,
        settings: EncoderSettings,
        feedback: ErrorFeedback | None,
    ) -> EncodedTile:
        unit = float(np.float32(step))
        classes = search_classes_of(private, tile.shape[1], unit)
        return EncodedTile(column_kernels.encode_columns(classes, tile, feedback), unit)

    def estimate_columns(
        self,
        tiles: Sequence[FloatArray],
        step: float,
        settings: EncoderSettings,
        feedback: ErrorFeedback | None,
    ) -> float:
        unit = float(np.float32(step))
        return estimate_bits(tiles, unit, self._states(settings), feedback)

    def decode(
        self, payload: bytes, unit: float, private: bytes, shape: tuple[int, int], out: FloatArray
    ) -> None:
        if is_by_columns(private):
            classes = decoder_classes_of(private, shape[1], unit)
            column_kernels.decode_columns(classes, payload, out)
            return
        kernels.decode(tables_of(private, unit), payload, out)

    def decode_tiles(
        self, matrix: StoredMatrix, tiles: range, out: int, dtype: str, threads: int
    ) -> None:
        decode_tiles(matrix, tiles, out, dtype, threads)

    def product(self, matrix: StoredMatrix, tiles: range, window: Window) -> LinearProduct:
        return LinearProduct(matrix, tiles, window)


def _sample(tiles: Sequence[FloatArray]) -> FloatArray:
    """Weights from everywhere in a matrix, a multiple of 32 of them, at most 2^16."""
    share = max(kernels.LANES, _SAMPLE // len(tiles))
    parts = [tile.reshape(-1)[:: max(1, tile.size // share)][:share] for tile in tiles]
    sample = np.concatenate(parts)
    rest = -len(sample) % kernels.LANES
    return np.ascontiguousarray(np.concatenate([sample, np.zeros(rest, np.float32)]))


@lru_cache(maxsize=64)
def _search_model(private: bytes, step: float, peak: float) -> tuple[kernels.Model, Any]:
    return EntropyModel.from_bytes(private).search_model(step, peak)
