"""Dense weight to container: normalize, tile, find the step, encode, and check by decoding."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from math import inf, log2, log10, nan

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchcodec_weights.codecs.base import BaseCodec, Codec, LosslessCodec
from torchcodec_weights.codecs.records import BitArray, EncodedTile, EncoderSettings, FloatArray
from torchcodec_weights.encoder.decoded import decode_bands
from torchcodec_weights.encoder.prepare import Prepared, by_importance
from torchcodec_weights.encoder.rate import (
    DB_PER_BIT,
    EXACT_WEIGHTS,
    Target,
    entropy_shift,
    nearest_target,
    out_of_reach,
    rounded,
    search_step,
)
from torchcodec_weights.encoder.spread import Spread
from torchcodec_weights.errors import CodecError, RateError, StepTooFineError
from torchcodec_weights.format import container
from torchcodec_weights.format.dtypes import dtype_name
from torchcodec_weights.format.order import sorted_order, sorted_rows
from torchcodec_weights.format.tiling import Block, TileGrid, tile_grid
from torchcodec_weights.matrix.importance import Importance
from torchcodec_weights.matrix.normalize import SIGN_SEED, Normalized, encode_scale, normalize
from torchcodec_weights.matrix.opened import OpenedMatrix, open_matrix

Normalizer = Callable[[FloatArray, float | None, int], Normalized]
"""Takes W, which it may not change, the codec's outlier threshold and the seed."""

_JUMP = 7  # times the width of a target's accepted range
_HEADROOM = 1.07
_MAX_ATTEMPTS = 5
_MAX_ADAPTED = 3.0  # octaves that a tile's step may be off the common one


@dataclass(frozen=True)
class EncodedMatrix:
    """A matrix as it is stored.

    Attributes:
        qdata: uint8 (bytes,), the container.
        scale: uint8 (rows,) or (1,).
        zero_point: float32 (rows,) or None.
        act_pre_scale: uint8 (cols,) or (1,).
        encodes: how often each weight was encoded on the way, on average.
    """

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None
    act_pre_scale: Tensor
    encodes: float


class _Encoding:
    """One matrix while it is encoded: encodes it at steps, and counts the bits that it takes.

    Attributes:
        norm: the normalized matrix.
        tiles: float32 (rows, cols) each, in the order in which the codec gets them.
        log2_steps: base-2 logarithms of the tiles' steps beside the common one.
        outliers: the tiles' outlier sections.
        encoded: the tiles that were encoded last, and `private` the data that they share.
    """

    def __init__(
        self,
        weight: Tensor,
        codec: Codec,
        settings: EncoderSettings,
        pool: ThreadPoolExecutor,
        prepare: Callable[[Callable[[], FloatArray]], Prepared],
    ) -> None:
        self.weight = weight.detach().cpu().contiguous()
        self.shape = rows, cols = self.weight.shape[0], self.weight.shape[1]
        self.size = rows * cols
        self.codec, self.settings, self.pool = codec, settings, pool
        prepared = prepare(lambda: self.dense(0, rows))
        self.norm, self.order = prepared.norm, prepared.order
        self.feedback, self.spread = prepared.feedback, prepared.spread
        self.peak = self.norm.peak
        self.by_columns = codec.feeds_back and self.order != 0
        blocks = self._blocks()
        self.across = blocks.across
        self.tiles = self._tiles(blocks)
        self.log2_steps = self._adapted(blocks) if settings.adaptive_steps else [0.0] * len(blocks)
        self.outliers = self._outlier_sections(blocks)
        self.encoded_weights = 0
        self.private = b""
        self.encoded: list[EncodedTile] = []
        # x265 does not always code a tiny frame twice in the same way.
        self._results: dict[tuple[float, float], tuple[bytes, list[EncodedTile]]] = {}

    def dense(self, first: int, end: int) -> FloatArray:
        """Some rows of the weight, a copy: float32 (end − first, cols)."""
        rows = self.weight[first:end].to(torch.float32, copy=True)
        array: FloatArray = rows.numpy()
        return array

    def _blocks(self) -> TileGrid:
        rows, cols = self.shape
        weights = self.codec.weights_per_tile(cols)
        if self.by_columns:
            weights = self.codec.weights_per_column_tile(cols)
        return tile_grid((rows, cols), self.settings.tile_shape, weights)

    def _tiles(self, blocks: Sequence[Block]) -> list[FloatArray]:
        """The tiles of Z, with rows and columns in the order of `self.order`."""
        norm, tiles = self.norm, []
        columns = sorted_order(norm.act_pre_scale, norm.z.shape[1])
        for b in blocks:
            tile = norm.z[b.first_row : b.end_row, b.first_col : b.end_col]
            if self.order & container.SORTED_COLUMNS:
                tile = tile[:, columns]
            if self.order & container.SORTED_ROWS:
                tile = tile[sorted_rows(norm.scale, b.first_row, b.end_row)]
            tiles.append(np.ascontiguousarray(tile))
        return tiles

    def _adapted(self, blocks: Sequence[Block]) -> list[float]:
        """Base-2 logarithms of tiles' steps beside the common one, of mean zero over the weights.

        A tile's error counts by the energy of its scales. At high rate the sum of the tiles' errors
        is least for the bits where all are equal: steps in inverse proportion to the scales' root
        mean square (reverse water-filling; Cover and Thomas, section 10.3.3).
        """
        row_scale, col_scale = self.norm.row_scale, self.norm.col_scale
        rms = [
            np.sqrt(
                np.square(row_scale[b.first_row : b.end_row]).mean()
                * np.square(col_scale[b.first_col : b.end_col]).mean()
            )
            for b in blocks
        ]
        logs = -np.log2(np.maximum(rms, np.finfo(np.float32).tiny))
        sizes = [b.rows * b.cols for b in blocks]
        return list(np.clip(logs - np.average(logs, weights=sizes), -_MAX_ADAPTED, _MAX_ADAPTED))

    def _outlier_sections(self, blocks: Sequence[Block]) -> list[bytes]:
        rows, cols = np.divmod(self.norm.outliers, self.shape[1])
        raw = self.weight.view(torch.uint8).numpy().reshape(self.size, -1)
        sections = []
        for b in blocks:
            first, end = np.searchsorted(rows, [b.first_row, b.end_row])
            here = np.arange(first, end)
            here = here[(cols[here] >= b.first_col) & (cols[here] < b.end_col)]
            places = (rows[here] - b.first_row) * b.cols + cols[here] - b.first_col
            values = raw[self.norm.outliers[here]].reshape(-1)
            sections.append(container.pack_outliers(container.Outliers(places, values)))
        return sections

    def encode(self, tiles: Sequence[int], log2_step: float) -> list[EncodedTile]:
        """Encode some tiles, by their indices, in parallel."""
        step = 2.0**log2_step
        codec, settings = self.codec, self.settings
        limits = codec.step_range(self.peak, settings)
        if self.by_columns:
            self.private = codec.prepare_columns(self.tiles, step, settings, self.feedback)
        else:
            self.private = codec.prepare(self.tiles, step, settings)

        def encoded(index: int) -> EncodedTile:
            tile, private = self.tiles[index], self.private
            if self.by_columns:
                return codec.encode_columns(tile, step, private, settings, self.feedback)
            own_step = float(np.clip(step * 2.0 ** self.log2_steps[index], *limits))
            return codec.encode(tile, own_step, self.peak, private, settings)

        self.encoded_weights += sum(self.tiles[index].size for index in tiles)
        # The context names the call that an encoder's program belongs to: `ffmpeg.running`.
        futures = [self.pool.submit(copy_context().run, encoded, index) for index in tiles]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def reset(self) -> None:
        """Return to the state before the first encode; results stay in the cache."""
        self.peak, self.private, self.encoded = self.norm.peak, b"", []

    @property
    def fixed_bits(self) -> float:
        """Bits per weight of everything but payloads."""
        norm = self.norm
        size = container.header_size(
            self.codec.name, self.private, len(self.tiles), self.across, self.order
        )
        size += sum(map(len, self.outliers)) + norm.scale.nbytes + norm.act_pre_scale.nbytes
        size += 0 if norm.zero_point is None else norm.zero_point.nbytes
        return 8 * size / self.size

    def was_encoded(self, log2_step: float) -> bool:
        """Whether all tiles were encoded at a step already."""
        return (log2_step, self.peak) in self._results

    def _encode_all(self, log2_step: float) -> None:
        key = log2_step, self.peak
        if not self.was_encoded(log2_step):
            encoded = self.encode(range(len(self.tiles)), log2_step)
            self._results[key] = self.private, encoded
        self.private, self.encoded = self._results[key]

    def expected_bits(self, z: FloatArray, log2_step: float) -> float:
        """Payload bits per weight that the codec's curve gives for a matrix or a tile of it."""
        curve = self.codec.rate_curve(self.settings)
        if self.spread is not None:
            return Spread(z).bits(log2_step, curve)
        return curve.rate(log2_step) + entropy_shift(z, log2_step)

    def first_step(self, payload: float, limits: tuple[float, float]) -> float:
        """Base-2 logarithm of the step at which payloads should take these bits per weight."""
        curve = self.codec.rate_curve(self.settings)
        if self.spread is None:
            # Within the limits at all times: the estimate counts levels, of which a tiny step has
            # many.
            start = float(np.clip(curve.log2_step_for(payload), *limits))
            for _ in range(2):
                shifted = payload - entropy_shift(self.norm.z, start)
                start = float(np.clip(curve.log2_step_for(shifted), *limits))
            return start
        start = float(np.clip(self.spread.log2_step_for(payload, curve), *limits))
        if self.by_columns:
            for _ in range(2):
                found = self.codec.estimate_columns(
                    self.tiles, 2.0**start, self.settings, self.feedback
                )
                start = float(np.clip(start + found - payload, *limits))  # an octave is a bit
        return start

    def measure(self, target: Target) -> Callable[[float], float]:
        """The function that encodes all at a log2 step and returns the target's quantity there."""
        return self.measure_bits if target.kind == "bits" else self.measure_snr

    def measure_bits(self, log2_step: float) -> float:
        """Encode all; returns bits per weight, everything counted."""
        self._encode_all(log2_step)
        payload = sum(len(tile.payload) for tile in self.encoded)
        return 8 * payload / self.size + self.fixed_bits

    def measure_snr(self, log2_step: float) -> float:
        """Encode all; returns the SNR in dB."""
        self._encode_all(log2_step)
        return self.finish()[1]

    def finish(self) -> tuple[EncodedMatrix, float]:
        """Pack what was encoded last and decode it again; returns it with its SNR in dB."""
        norm = self.norm
        vectors = (
            torch.from_numpy(norm.scale),
            None if norm.zero_point is None else torch.from_numpy(norm.zero_point),
            torch.from_numpy(norm.act_pre_scale),
        )
        data = self._pack()
        snr_db = self._snr_db(open_matrix(torch.frombuffer(data, dtype=torch.uint8), *vectors))
        container.set_snr(data, snr_db)
        qdata = torch.frombuffer(data, dtype=torch.uint8)
        encodes = self.encoded_weights / self.size
        return EncodedMatrix(qdata, *vectors, encodes=encodes), snr_db

    def _snr_db(self, matrix: OpenedMatrix) -> float:
        """Weights over errors of what is decoded, in dB; infinite if there are none."""
        error = energy = 0.0
        for first, rows in decode_bands(matrix, torch.float32):
            weight = self.dense(first, first + len(rows))
            energy += float(np.sum(np.square(weight), dtype=np.float64))
            error += float(np.sum(np.square(weight - rows.numpy()), dtype=np.float64))
        if error == 0:
            return inf
        return 10 * log10(energy / error) if energy > 0 else -inf

    def _pack(self) -> bytearray:
        """The container, without its SNR."""
        norm = self.norm
        return container.pack(
            codec=self.codec.name,
            dtype=dtype_name(self.weight.dtype),
            shape=self.shape,
            bases=(norm.row_base, norm.col_base),
            snr_db=nan,
            vectors_crc=_vectors_crc(norm.scale, norm.zero_point, norm.act_pre_scale),
            private=self.private,
            payloads=[tile.payload for tile in self.encoded],
            outliers=self.outliers,
            units=[tile.unit for tile in self.encoded],
            across=self.across,
            order=self.order,
        )


def encode_matrix(
    weight: Tensor,
    codec: BaseCodec,
    target: Target | None,
    settings: EncoderSettings,
    pool: ThreadPoolExecutor,
    seed: int = SIGN_SEED,
    importance: Importance | None = None,
    normalizer: Normalizer | None = None,
) -> EncodedMatrix:
    """Encode a matrix to a target, or losslessly.

    Args:
        weight: float32, float16 or bfloat16 (rows, cols), finite.
        codec: what to encode with.
        target: bits per weight with everything counted, step, or SNR; None if it is lossless.
        settings: validated.
        pool: runs the encoders.
        seed: of the random signs of `normalize`; a lossless codec has none.
        importance: of rows and columns, which the steps then follow; `target` must be bits.
        normalizer: where importance is not known; by default `normalize`.

    Raises:
        RateError: the target cannot be reached; names the nearest that can.
        CodecError: the encoder failed.
    """
    if isinstance(codec, LosslessCodec):
        return _encode_bits(weight.detach().cpu().contiguous(), codec, pool)
    assert isinstance(codec, Codec)
    assert target is not None

    def prepare(dense: Callable[[], FloatArray]) -> Prepared:
        if importance is not None:
            return by_importance(dense(), importance, codec, settings, target.value, seed)
        if normalizer is not None:
            return Prepared(normalizer(dense(), codec.outlier_threshold, seed))
        return Prepared(normalize(dense(), codec.outlier_threshold, seed, again=dense))

    work = _Encoding(weight, codec, settings, pool, prepare)
    finest, coarsest = map(float, codec.step_range(work.norm.peak, settings))
    limits = log2(finest), log2(coarsest)
    if target.kind == "step":
        if not finest <= target.value <= coarsest:
            lowest, highest = rounded(finest, up=True), rounded(coarsest, up=False)
            raise RateError(
                f"step={target.value:g} cannot be reached for this matrix with codec "
                f"{codec.name!r}; allowed: {lowest:.4g} to {highest:.4g}",
                lowest if target.value < finest else highest,
            )
        work.measure_bits(log2(target.value))
    elif not work.norm.z.any():
        bits = work.measure_bits(limits[1])  # nothing is left to code but empty frames
        if target.kind == "bits" and bits > target.value:
            raise out_of_reach(target, rounded(bits, up=True))
    else:
        _search(work, target, limits)
    return work.finish()[0]


def _encode_bits(weight: Tensor, codec: LosslessCodec, pool: ThreadPoolExecutor) -> EncodedMatrix:
    """Encode the bits of a weight as they are: no scales but one, no search."""
    rows, cols = weight.shape
    dtype = dtype_name(weight.dtype)
    bits = _bits(weight)
    blocks = tile_grid((rows, cols), None, codec.tile_weights)
    tiles = [bits[block.first_row : block.end_row] for block in blocks]
    private = codec.prepare_bits(tiles, dtype)
    coded = list(pool.map(lambda tile: codec.encode_bits(tile, dtype, private), tiles))
    outliers = [
        container.pack_outliers(
            container.Outliers(places, tile.reshape(-1)[places].view(np.uint8).reshape(-1))
        )
        for tile, (_, places) in zip(tiles, coded, strict=True)
    ]
    unit, base = encode_scale(np.ones(1, np.float32), np.zeros(1, np.uint8))
    scales = torch.from_numpy(unit), torch.from_numpy(unit.copy())
    data = container.pack(
        codec=codec.name,
        dtype=dtype,
        shape=(rows, cols),
        bases=(base, base),
        snr_db=inf,
        vectors_crc=_vectors_crc(unit, None, unit),
        private=private,
        payloads=[payload for payload, _ in coded],
        outliers=outliers,
        units=[1.0] * len(tiles),
    )
    qdata = torch.frombuffer(data, dtype=torch.uint8)
    matrix = open_matrix(qdata, scales[0], None, scales[1])
    for first, decoded in decode_bands(matrix, weight.dtype):
        if not np.array_equal(_bits(decoded), bits[first : first + len(decoded)]):
            raise CodecError(f"codec {codec.name!r} did not return the weight it was given")
    return EncodedMatrix(qdata, scales[0], None, scales[1], encodes=1.0)


def _vectors_crc(
    scale: NDArray[np.uint8], zero_point: FloatArray | None, act_pre_scale: NDArray[np.uint8]
) -> int:
    """CRC-32C over the vectors stored beside the container, as the header holds it."""
    offsets = b"" if zero_point is None else zero_point.tobytes()
    return container.crc32c(scale.tobytes(), offsets, act_pre_scale.tobytes())


def _bits(weight: Tensor) -> BitArray:
    if weight.element_size() == 4:
        return weight.view(torch.int32).numpy().view(np.uint32)
    return weight.view(torch.int16).numpy().view(np.uint16)


def _search(work: _Encoding, target: Target, limits: tuple[float, float]) -> None:
    """Encode at the step that meets a target.

    Raises:
        RateError: no step was found that does. The nearest target that it names was tried.
    """
    try:
        _attempt(work, target, limits)
        return
    except RateError as error:
        nearest = error.nearest
    # Rates do not fall everywhere as the step grows, so what one search came across need not be
    # where another one ends.
    for _ in range(_MAX_ATTEMPTS):
        try:
            _attempt(work, Target(target.kind, nearest), limits)
        except RateError as error:
            nearest = error.nearest
        else:
            break
    else:
        work.reset()
        measure = work.measure(target)
        ends = [x for x in limits if x == limits[1] or work.was_encoded(x)]
        nearest = nearest_target(target, {x: measure(x) for x in ends}, limits)
    raise out_of_reach(target, nearest)


def _attempt(work: _Encoding, target: Target, limits: tuple[float, float]) -> None:
    """One search, which depends on nothing that was encoded before.

    Raises:
        RateError: no step was found; names the nearest that this search came across.
    """
    work.reset()
    curve = work.codec.rate_curve(work.settings)
    measure = work.measure(target)
    if target.kind == "bits":
        low, high = target.accepted
        payload = (low + high) / 2 - work.fixed_bits
        start = work.first_step(payload, limits)
        slope = (curve.rate(start + 0.1) - curve.rate(start - 0.1)) / 0.2
        if work.spread is not None:
            slope = min(slope, -0.5)
        if len(work.tiles) >= 3 and not work.by_columns:
            start += _probe(work, start, payload, slope)
    else:
        # Half a bit above the rate–distortion function is where practical codecs lie.
        start = curve.log2_step_for(max(target.value / DB_PER_BIT + 0.3, 0.1))
        slope = -DB_PER_BIT
    # The bits of a calibrated weight are its share of an average: a little less is no failure.
    exact = work.size >= EXACT_WEIGHTS and work.spread is None
    slope = min(slope, -0.2)
    try:
        search_step(measure, start, target, slope, limits, exact)
    except RateError as error:
        low, high = target.accepted
        if abs(error.nearest - target.value) < _JUMP * (high - low):
            # The rate jumps where a codec of samples goes from one quantizer to the next. A larger
            # peak shifts the steps at which it does.
            work.peak *= _HEADROOM
            limits = (limits[0] + log2(_HEADROOM), limits[1])
            search_step(measure, start, target, slope, limits, exact)
            return
        # Data of low entropy, exact or nearly so in fewer bits than asked for, is no failure.
        if target.kind != "bits" or error.nearest > target.value:
            raise
        try:
            most = work.measure_bits(limits[0])
        except StepTooFineError:
            raise error from None
        if most > target.value:
            raise
        if work.finish()[1] < DB_PER_BIT * target.value:
            raise


def _probe(work: _Encoding, start: float, payload: float, slope: float) -> float:
    """Correction of the start from one tile: cheaper than a first encode of all."""
    middle = len(work.tiles) // 2
    tile = work.tiles[middle]
    try:
        (encoded,) = work.encode([middle], start)
    except StepTooFineError:
        return 0.0  # the search tells
    rate = 8 * len(encoded.payload) / tile.size + work.log2_steps[middle]  # an octave is a bit
    rate += work.expected_bits(work.norm.z, start) - work.expected_bits(tile, start)
    return (payload - rate) / slope
