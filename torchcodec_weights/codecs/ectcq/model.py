"""The entropy model of ECTCQ: its levels, how probable they are, and the value of each.

Level k of union quantizer q stands for (2k + q) · step, moved to the centroid of what is coded with
it. Rows and columns have random signs, so levels of equal magnitude are equally probable: half a
table is stored for each quantizer. Levels are numbered as symbols k + 128.
"""

import struct
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.ectcq import kernels
from torchcodec_weights.codecs.records import FloatArray, StoredMatrix
from torchcodec_weights.errors import CodecError

MAX_LEVEL = 126
"""Magnitudes have symbols of eight bits."""

LAMBDA = 0.3
"""Weight of a bit against squared error, in squares of the step."""

ZERO = 128
"""The symbol of level 0."""

_HALF = kernels.SLOTS // 2
_SHIFT_UNIT = 128
_CELLS_PER_STEP = 16
_PASSES = 5
TRAINING_STATES = 8
_HEAD = struct.Struct("<BBB")


@dataclass(frozen=True)
class EntropyModel:
    """Symmetric frequencies and values of two union quantizers, by magnitude.

    Attributes:
        states: of the trellis.
        frequency: two uint16 arrays that sum to 2,048. The first is for magnitudes 0, 2, 4, …
            (in steps); the frequency of 0 out of 4,096 is twice its number. The second is for
            magnitudes 1, 3, 5, …
        shift: two int8 arrays, for the same magnitudes: the value less the magnitude, in 128ths of
            a step. The first element of the first is 0.
    """

    states: int
    frequency: tuple[NDArray[np.uint16], NDArray[np.uint16]]
    shift: tuple[NDArray[np.int8], NDArray[np.int8]]

    @property
    def peak(self) -> int:
        """The largest magnitude, in steps."""
        return max(2 * len(self.frequency[0]) - 2, 2 * len(self.frequency[1]) - 1)

    def to_bytes(self) -> bytes:
        """As it is stored in a container's private data (docs/bitstream.md)."""
        counts = [len(half) for half in self.frequency]
        head = _HEAD.pack(self.states.bit_length() - 1, *counts)
        tables = [half.astype("<u2").tobytes() for half in self.frequency]
        return head + b"".join(tables) + self.shift[0][1:].tobytes() + self.shift[1].tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "EntropyModel":
        """The inverse of `to_bytes`.

        Raises:
            CodecError: the data does not describe a model.
        """
        if len(data) < _HEAD.size:
            raise CodecError("ectcq: entropy model is cut short")
        log2_states, evens, odds = _HEAD.unpack_from(data)
        body = data[_HEAD.size :]
        valid = 1 <= evens <= MAX_LEVEL + 1 and 1 <= odds <= MAX_LEVEL + 1
        valid = valid and 2**log2_states in kernels.trellises()
        if not valid or len(body) != 3 * (evens + odds) - 1:
            raise CodecError("ectcq: entropy model is malformed")
        words = np.frombuffer(body, "<u2", evens + odds).astype(np.uint16)
        shifts = np.frombuffer(body, np.int8, offset=2 * (evens + odds))
        frequency = words[:evens], words[evens:]
        if any(int(half.sum()) != _HALF or not half.all() for half in frequency):
            raise CodecError("ectcq: frequencies do not add up")
        if evens == 1 or (odds == 1 and words[evens] == 2 * _HALF):
            raise CodecError("ectcq: entropy model has a single level")
        even_shift = np.concatenate([np.zeros(1, np.int8), shifts[: evens - 1]])
        return cls(2**log2_states, frequency, (even_shift, shifts[evens - 1 :]))

    def by_symbol(self) -> tuple[NDArray[np.uint32], NDArray[np.float64]]:
        """Frequencies out of 4,096 and values in steps, both (2, 256) by quantizer and symbol."""
        frequency = np.zeros((2, kernels.SYMBOLS), np.uint32)
        values = np.zeros((2, kernels.SYMBOLS))
        for q, (half, shift) in enumerate(zip(self.frequency, self.shift, strict=True)):
            magnitude = 2.0 * np.arange(len(half)) + q + shift / _SHIFT_UNIT
            up = ZERO + np.arange(len(half))
            down = ZERO - q - np.arange(len(half))
            frequency[q, down], frequency[q, up] = half, half
            values[q, down], values[q, up] = -magnitude, magnitude
        frequency[0, ZERO] *= 2
        values[0, ZERO] = 0.0
        return frequency, values

    def decoder_tables(self, step: float) -> kernels.Tables:
        """What the decoder looks up; values are rounded to float32 once, here."""
        frequency, values = self.by_symbol()
        tables = kernels.Tables()
        h0, h1 = kernels.trellises()[self.states]
        tables.feedback, tables.input, tables.unit = h0 >> 1, h1 >> 1, step
        slots = np.frombuffer(tables.slots, np.uint32).reshape(2, kernels.SLOTS)
        for q in range(2):
            symbols = np.repeat(np.arange(kernels.SYMBOLS, dtype=np.uint32), frequency[q])
            starts = np.cumsum(frequency[q]) - frequency[q]
            offsets = np.arange(kernels.SLOTS, dtype=np.uint32) - starts[symbols]
            slots[q] = frequency[q][symbols] | offsets << 12 | symbols << 24
        np.frombuffer(tables.values, np.float32)[:] = (values * step).astype(np.float32).reshape(-1)
        return tables

    def search_model(self, step: float, peak: float) -> tuple[kernels.Model, NDArray[np.uint8]]:
        """What the trellis search looks up, and the array that it points into."""
        frequency, values = self.by_symbol()
        values = values * step
        with np.errstate(divide="ignore"):
            bits = np.where(frequency > 0, 12 - np.log2(frequency), np.inf)
        constant = np.square(values) + LAMBDA * step**2 * bits
        cells = int(np.ceil(2 * peak / step * _CELLS_PER_STEP)) + 2
        centers = (np.arange(cells) + 0.5) * step / _CELLS_PER_STEP - peak
        best = np.empty((4, cells), np.uint8)
        for q in range(2):
            for parity in range(2):
                symbols = np.flatnonzero(frequency[q])
                symbols = symbols[symbols % 2 == parity]
                costs = constant[q, symbols] - 2 * np.multiply.outer(centers, values[q, symbols])
                best[2 * q + parity] = symbols[np.argmin(costs, axis=1)]
        model = kernels.Model()
        np.frombuffer(model.frequency, np.uint32)[:] = frequency.reshape(-1)
        starts = np.cumsum(frequency, axis=1) - frequency
        np.frombuffer(model.start, np.uint32)[:] = starts.reshape(-1)
        lines = np.stack([constant, 2 * values], axis=-1)
        np.frombuffer(model.line, np.float32)[:] = lines.astype(np.float32).reshape(-1)
        model.best, model.cells = best.ctypes.data, cells
        model.first_cell, model.cells_per_unit = -peak, _CELLS_PER_STEP / step
        model.states = self.states
        return model, best


def train(sample: FloatArray, step: float, peak: float, states: int) -> EntropyModel:
    """Fit a model to weights: search, count, take centroids, and again.

    Args:
        sample: float32 (n,), n a multiple of 32, of unit variance, within ±peak.
        step: in standard deviations.
        peak: bound on the magnitude of all weights that will be coded.
        states: of the trellis that will be searched.
    """
    counts = levels_for(peak / step)
    # The statistics hardly depend on the trellis: eight states give as good a model as 256.
    model = gaussian_model(1 / step, counts, TRAINING_STATES)
    for _ in range(_PASSES):
        searched, kept = model.search_model(step, peak)
        path = kernels.search(searched, sample)
        del kept
        statistics = statistics_of(path, sample / np.float32(step))
        model = fit(statistics, counts, TRAINING_STATES)
    return replace(model, states=states)


def levels_for(peak: float) -> tuple[int, int]:
    """Numbers of even and of odd magnitudes that reach a peak, in steps."""
    return max(2, int(np.ceil(peak / 2)) + 1), max(1, int(np.ceil((peak - 1) / 2)) + 1)


def gaussian_model(deviation: float, counts: tuple[int, int], states: int) -> EntropyModel:
    """A model to begin with.

    Args:
        deviation: standard deviation of the weights, in steps.
        counts: of even and odd magnitudes.
        states: of the trellis.
    """
    magnitudes = [2.0 * np.arange(counts[q]) + q for q in range(2)]
    start = [np.exp(-np.square(m / deviation) / 2) * (1 + (m > 0)) for m in magnitudes]
    return EntropyModel(
        states,
        (_frequencies(start[0]), _frequencies(start[1])),
        (np.zeros(counts[0], np.int8), np.zeros(counts[1], np.int8)),
    )


def statistics_of(
    path: NDArray[np.uint16], scaled: FloatArray, groups: NDArray[np.integer] | None = None
) -> NDArray[np.float64]:
    """What paths code, by union quantizer and index of the magnitude.

    Args:
        path: uint16, symbol | union quantizer << 8.
        scaled: float32 of the same shape, the weights in steps.
        groups: of the same shape, numbers from 0 on that separate the statistics.

    Returns:
        (groups, 2, 2, 128), without `groups` (2, 2, 128): how many weights, and the sum of their
        projections on the signs of their levels, each (quantizers, magnitudes).
    """
    quantizer = (path >> 8).astype(np.int64)
    level = (path & 255).astype(np.int64) - ZERO
    magnitude = np.where(level >= 0, level, -quantizer - level)
    key = quantizer * ZERO + magnitude
    count = 1
    if groups is not None:
        key += groups.astype(np.int64) * (2 * ZERO)
        count = int(groups.max()) + 1
    signed = np.where(level >= 0, scaled, -scaled)
    size = count * 2 * ZERO
    found = np.bincount(key.reshape(-1), minlength=size).astype(np.float64)
    total = np.bincount(key.reshape(-1), signed.reshape(-1), minlength=size).astype(np.float64)
    both = np.stack([part.reshape(count, 2, ZERO) for part in (found, total)], axis=1)
    return both if groups is not None else both[0]


def fit(statistics: NDArray[np.float64], counts: tuple[int, int], states: int) -> EntropyModel:
    """The model of weights: their frequencies and centroids.

    Args:
        statistics: (2, 2, 128) of `statistics_of`. Magnitudes beyond `counts` count as the largest.
        counts: of even and odd magnitudes.
        states: of the trellis.
    """
    frequency, shift = [], []
    for q in range(2):
        found, total = (part[q, : counts[q]].copy() for part in statistics)
        found[-1] += statistics[0, q, counts[q] :].sum()
        total[-1] += statistics[1, q, counts[q] :].sum()
        # A few observations at the nominal value keep rare levels in their place.
        nominal = 2.0 * np.arange(counts[q]) + q
        offset = (total - found * nominal) / (found + 2)
        if q == 0:
            offset[0] = 0
        frequency.append(_frequencies(found + 0.1))
        shift.append(np.clip(np.rint(offset * _SHIFT_UNIT), -127, 127).astype(np.int8))
    return EntropyModel(states, (frequency[0], frequency[1]), (shift[0], shift[1]))


def _frequencies(counts: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Frequencies of at least 1 that sum to 2,048 and make the counts' code shortest, nearly."""
    share = counts / counts.sum()
    frequency = np.maximum(1, np.floor(share * _HALF)).astype(np.int64)
    while (excess := int(frequency.sum()) - _HALF) != 0:
        change = -1 if excess > 0 else 1
        with np.errstate(divide="ignore", invalid="ignore"):  # for frequencies that would be 0
            gain = share * np.log((frequency + change) / frequency)
        gain[frequency + change < 1] = -np.inf
        frequency[int(np.argmax(gain))] += change
    return frequency.astype(np.uint16)


@lru_cache(maxsize=1024)
def tables_of(private: bytes, step: float) -> kernels.Tables:
    """Decoder tables of a matrix's private data and step.

    Raises:
        CodecError: the data does not describe a model.
    """
    return EntropyModel.from_bytes(private).decoder_tables(step)


def tables_of_matrix(matrix: StoredMatrix) -> kernels.Tables:
    """Decoder tables of a matrix.

    Raises:
        CodecError: its tiles differ in their step, or the private data does not describe a model.
    """
    unit = float(matrix.units[0])
    if (matrix.units != unit).any():
        raise CodecError("ectcq: tiles differ in their step")
    return tables_of(matrix.private, unit)
