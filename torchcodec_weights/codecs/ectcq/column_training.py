"""Training of streams by columns: classes of groups of columns, and their entropy models.

The statistics are those of the weights that the quantizer sees, errors of earlier columns carried
into them, so each pass over the sample runs the feedback.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.ectcq import kernels
from torchcodec_weights.codecs.ectcq.column_kernels import search_columns
from torchcodec_weights.codecs.ectcq.columns import MAX_CLASSES, ColumnModel
from torchcodec_weights.codecs.ectcq.model import (
    LAMBDA,
    MAX_LEVEL,
    TRAINING_STATES,
    ZERO,
    fit,
    gaussian_model,
    levels_for,
    statistics_of,
)
from torchcodec_weights.codecs.records import ErrorFeedback, FloatArray
from torchcodec_weights.errors import StepTooFineError

SAMPLE_ROWS = 256

MAX_PEAK = 2 * MAX_LEVEL
"""The largest magnitude that a level has, in steps."""

_PASSES = 3
_BINS_PER_OCTAVE = 4
_LEAST_DEVIATION = 1 / 8  # steps; what lies below is coded as zeros all the same
_PARTS = 128  # of the sorted groups, between which classes may end
_HEAD_BITS = 600  # of a payload, first states less what they carry of weights; measured
_LEVEL_BITS = 24  # of a level in a table
_HALF = kernels.SLOTS // 2  # frequencies of a quantizer's magnitudes add up to this


@dataclass(frozen=True, eq=False)
class Pass:
    """What a search of the sample found, by group of columns.

    Attributes:
        statistics: (groups, 2, 2, 128) of `statistics_of`.
        deviation: (groups,), root mean square of what was quantized, in steps.
        peak: (groups,), the largest magnitude of it, in steps.
        carried: (groups,), the largest magnitude of what was carried in, in steps.
    """

    statistics: NDArray[np.float64]
    deviation: NDArray[np.float64]
    peak: NDArray[np.float64]
    carried: NDArray[np.float64]


def sample_rows(tiles: Sequence[FloatArray]) -> FloatArray:
    """At most `SAMPLE_ROWS` rows of a matrix in their order, float32 (rows, cols).

    They are every n-th of all rows from the weakest to the strongest. Where rows differ in energy,
    every n-th row of the matrix would give up to 0.08 bits a weight too many or too few; and so
    would, by 0.04, rows that stay in the order of their energy, as a path goes from row to row.
    """
    ends = np.cumsum([len(tile) for tile in tiles])
    count = min(SAMPLE_ROWS, int(ends[-1]))
    order = np.argsort(np.concatenate([np.square(tile).sum(1) for tile in tiles]), kind="stable")
    rows = np.sort(order[(np.arange(count) * 2 + 1) * len(order) // (2 * count)])
    holders = np.searchsorted(ends, rows, side="right")
    return np.stack(
        [tiles[h][row - ends[h]] for h, row in zip(holders.tolist(), rows.tolist(), strict=True)]
    ).astype(np.float32)


def train_columns(
    tiles: Sequence[FloatArray], step: float, states: int, feedback: ErrorFeedback | None
) -> ColumnModel:
    """Fit classes of columns and their models to a matrix.

    Args:
        tiles: float32 (rows, cols) each, all of the matrix, in coded order.
        step: in units of the tiles.
        states: of the trellis that will be searched.

    Raises:
        StepTooFineError: weights lie beyond the levels.
    """
    peaks = _group_maximum(np.max([np.abs(tile).max(0) for tile in tiles], axis=0)) / step
    if peaks.max() > MAX_PEAK:
        raise StepTooFineError(
            f"ectcq: weights reach {peaks.max():.0f} steps of {step:g}: allowed: {MAX_PEAK}"
        )
    sample = sample_rows(tiles)
    rows = sum(len(tile) for tile in tiles)
    deviation = np.sqrt(_group_mean(np.square(sample, dtype=np.float64).mean(0))) / step
    bins = _bins(deviation)
    starts = [
        gaussian_model(
            float(max(deviation[bins == k].max(), _LEAST_DEVIATION)),
            _capped(levels_for(1.25 * peaks[bins == k].max() + 2)),
            TRAINING_STATES,
        )
        for k in range(bins.max() + 1)
    ]
    model = ColumnModel(tuple(starts), bins)
    for _ in range(_PASSES):
        found = search_sample(model, sample, step, feedback)
        bins = _bins(found.deviation)
        counts = [
            _capped(levels_for(1.25 * found.peak[bins == k].max() + 2))
            for k in range(bins.max() + 1)
        ]
        model = ColumnModel(
            tuple(
                fit(found.statistics[bins == k].sum(0), counts[k], TRAINING_STATES)
                for k in range(bins.max() + 1)
            ),
            bins,
        )
    of_group = choose_classes(found, rows / len(sample))
    classes = []
    for k in range(of_group.max() + 1):
        own = of_group == k
        counts_k = _levels(tiles, step, feedback is not None, own, peaks, found, len(sample), rows)
        classes.append(fit(found.statistics[own].sum(0), counts_k, states))
    return ColumnModel(tuple(classes), of_group)


def estimate_bits(
    tiles: Sequence[FloatArray], step: float, states: int, feedback: ErrorFeedback | None
) -> float:
    """Bits per weight of a matrix's payloads, with the arguments of `train_columns`."""
    model = train_columns(tiles, step, states, feedback)
    sample = sample_rows(tiles)
    found = search_sample(model, sample, step, feedback)
    bits = 0.0
    for k, own in enumerate(model.classes):
        frequency, _ = own.by_symbol()
        counts = found.statistics[model.of_group == k, 0].sum(0)
        for q, half in enumerate(own.frequency):
            of_symbol = frequency[q, ZERO : ZERO + len(half)]
            bits += float(counts[q, : len(half)] @ np.log2(kernels.SLOTS / of_symbol))
    rows, cols = sum(len(tile) for tile in tiles), sample.shape[1]
    thrown_away = -cols % kernels.LANES
    frequency, _ = model.classes[model.of_group[-1]].by_symbol()
    bits += thrown_away * len(sample) * float(np.log2(kernels.SLOTS / frequency[0, ZERO]))
    return bits / sample.size + len(tiles) * _HEAD_BITS / (rows * cols)


def search_sample(
    model: ColumnModel, sample: FloatArray, step: float, feedback: ErrorFeedback | None
) -> Pass:
    """Search a sample of rows, float32 (rows, cols), with the models of its groups."""
    weights, path = search_columns(model.search_classes(step), sample, feedback)
    cols, rows = weights.shape
    scaled = weights / np.float32(step)
    groups = np.broadcast_to(np.arange(cols)[:, None] // kernels.LANES, (cols, rows))
    magnitude = np.abs(scaled)
    carried = np.abs(scaled - sample.T / np.float32(step)).max(1)
    return Pass(
        statistics_of(path, scaled, groups),
        np.sqrt(_group_mean(np.square(scaled, dtype=np.float64).mean(1))),
        _group_maximum(magnitude.max(1)),
        _group_maximum(carried),
    )


def choose_classes(found: Pass, scale: float) -> NDArray[np.uint8]:
    """The class of each group: those that make tables and coded weights together shortest.

    Classes are intervals of the deviation; dynamic programming finds their ends.

    Args:
        scale: weights of the matrix to one of the sample.

    Returns:
        uint8 (groups,), from 0 on in the order of the deviation.
    """
    order = np.argsort(found.deviation, kind="stable")
    parts = np.array_split(order, min(_PARTS, len(order)))
    counts = np.stack([found.statistics[part, 0].sum(0) for part in parts]) * scale
    peak = np.array([found.peak[part].max() for part in parts])
    summed = np.concatenate([np.zeros((1, *counts.shape[1:])), np.cumsum(counts, axis=0)])
    n = len(parts)
    cost = np.full((n, n + 1), np.inf)  # of a class of parts i to j − 1
    for j in range(1, n + 1):
        widest = np.maximum.accumulate(peak[:j][::-1])[::-1]
        cost[:j, j] = _bits(summed[j] - summed[:j], widest)
    least = np.full(n + 1, np.inf)
    least[0] = 0
    choices = []
    ends = []
    for _ in range(min(MAX_CLASSES, n)):
        totals = least[:n, None] + cost
        choices.append(np.argmin(totals, axis=0))
        least = np.min(totals, axis=0)
        ends.append(least[n])
    of_part = np.zeros(n, np.uint8)
    end = n
    for k in range(int(np.argmin(ends)), -1, -1):
        begin = int(choices[k][end])
        of_part[begin:end] = k
        end = begin
    of_group = np.empty(len(order), np.uint8)
    for part, number in zip(parts, of_part, strict=True):
        of_group[part] = number
    return of_group


def _bits(counts: NDArray[np.float64], peak: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bits of classes with so many weights of each magnitude, and of their tables; without signs.

    Args:
        counts: (classes, 2, 128).
        peak: (classes,), in steps.
    """
    levels = np.array([levels_for(p) for p in peak])
    total = counts.sum(2, keepdims=True)
    share = counts / np.maximum(total, 1)
    # A level that no weight has takes a slot from the others.
    unseen = np.maximum(levels - (counts > 0).sum(2), 0) / _HALF
    bits = -(counts * np.log2(np.maximum(share, 1 / _HALF))).sum(2)
    bits -= total[..., 0] * np.log2(1 - np.minimum(unseen, 0.5))
    return bits.sum(1) + _LEVEL_BITS * levels.sum(1) + 8


def _levels(
    tiles: Sequence[FloatArray],
    step: float,
    carries: bool,
    own: NDArray[np.bool_],
    peaks: NDArray[np.float64],
    found: Pass,
    sampled: int,
    rows: int,
) -> tuple[int, int]:
    """Numbers of even and odd magnitudes of a class.

    They reach what the sample's largest weight lets one expect of all rows, and beyond that as far
    as clipping would cost more than levels do: D + `LAMBDA` · R, in squares of the step.

    Args:
        carries: whether errors are carried into the weights.
        own: (groups,), which ones are of the class.
        peaks: (groups,), the largest magnitudes of all rows, in steps, before errors are carried.
        found: in the sample.
        sampled, rows: of the sample and of the matrix.
    """
    columns = kernels.LANES * int(own.sum())
    # The largest of n Gaussian values grows with √(2 ln n).
    growth = float(np.sqrt(np.log(rows * columns + 1) / np.log(sampled * columns + 1)))
    expected = growth * float(found.peak[own].max())
    high = float(peaks[own].max())
    low = min(expected + 1, high)
    if carries:
        low = expected + 1
        high += growth * float(found.carried[own].max())
    if high <= low:
        return _capped(levels_for(low))
    cols = np.repeat(own, kernels.LANES)[: tiles[0].shape[1]]
    magnitude = [np.abs(tile[:, cols]) / step for tile in tiles]
    beyond = np.concatenate([part[part > low] for part in magnitude])
    reached = np.arange(low, high + 2, 2.0)
    clipped = np.square(np.maximum(beyond[:, None] - reached, 0)).sum(0)
    # Two quantizers have a level each for two steps, and take a slot of 2,048 for it.
    bits = (reached - low) * (_LEVEL_BITS + rows * columns / (2 * _HALF * np.log(2)))
    return _capped(levels_for(float(reached[np.argmin(clipped + LAMBDA * bits)])))


def _capped(counts: tuple[int, int]) -> tuple[int, int]:
    return min(counts[0], MAX_LEVEL + 1), min(counts[1], MAX_LEVEL + 1)


def _bins(deviation: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Groups of about the same deviation, as numbers from 0 on."""
    octaves = np.rint(_BINS_PER_OCTAVE * np.log2(np.maximum(deviation, _LEAST_DEVIATION)))
    return np.unique(octaves, return_inverse=True)[1].astype(np.uint8)


def _group_mean(columns: NDArray[np.floating]) -> NDArray[np.float64]:
    starts = np.arange(0, len(columns), kernels.LANES)
    sizes = np.diff(starts, append=len(columns))
    return np.add.reduceat(columns.astype(np.float64), starts) / sizes


def _group_maximum(columns: NDArray[np.floating]) -> NDArray[np.float64]:
    starts = np.arange(0, len(columns), kernels.LANES)
    return np.maximum.reduceat(columns.astype(np.float64), starts)
