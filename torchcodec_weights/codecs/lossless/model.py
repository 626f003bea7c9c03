"""Which bits of a weight are entropy-coded with the exponent, and with which frequencies.

The field is the exponent with up to three bits of the mantissa. Weights are nearly Gaussian, so
within an octave smaller ones are more frequent: the first bits of the mantissa are worth some 0.07
bits per weight (benchmarks/lossless.py). The sign is worth nothing.
"""

import struct

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.lossless import kernels

_HEAD = struct.Struct("<BH")
_SLOTS = 4096
_SYMBOL_BITS = 8


def choose(counts: NDArray[np.uint64], dtype: str) -> bytes:
    """The private data that codes weights in the fewest bits.

    Args:
        counts: uint64, of magnitudes by their highest bits, as `kernels.count` has them.
        dtype: of the weights.
    """
    finest = {"float32": 20, "float16": 7, "bfloat16": 4}[dtype]
    longest = len(counts).bit_length() - 1 - _SYMBOL_BITS  # bits of the field beyond eight
    candidates = []
    for fewer in range(longest + 1):
        fields = counts.reshape(-1, 2**fewer).sum(axis=1)
        private, bits = _model(fields, finest + fewer, 32 if dtype == "float32" else 16)
        # A shorter field leaves more bits to the planes below it, which are stored as they are.
        candidates.append((bits + fewer * float(counts.sum()), private))
    return min(candidates)[1]


def _model(fields: NDArray[np.uint64], shift: int, item_bits: int) -> tuple[bytes, float]:
    """Private data for one length of the field, and the bits that fields and outliers take."""
    total = float(fields.sum())
    # A rare field takes a slot, which makes all others longer, and bytes of the table; an outlier
    # takes its value and a position of 16 bits.
    slot_bits = total / (_SLOTS * np.log(2)) + 8
    outlier_bits = item_bits + 16
    kept = fields * float(outlier_bits - 12) > slot_bits
    if not kept.any():
        kept = fields == fields.max()
    # Symbols from 1 up stand for the 255 fields above the base; the rarer end is cut off.
    present = np.flatnonzero(kept[1:]) + 1
    base = 0
    if len(present) and present[-1] > kernels.SYMBOLS - 1:
        starts = np.arange(len(fields) - kernels.SYMBOLS + 1)
        below = np.concatenate([[0.0], np.cumsum(np.where(kept, fields, 0)[1:], dtype=np.float64)])
        base = int(np.argmax(below[starts + kernels.SYMBOLS - 1] - below[starts]))
    symbols = np.zeros(kernels.SYMBOLS, np.uint64)
    symbols[1:] = np.where(kept, fields, 0)[base + 1 : base + kernels.SYMBOLS]
    symbols[0] = fields[0] if kept[0] else 0
    table, bits = kernels.table(symbols)
    bits += (total - float(symbols.sum())) * outlier_bits + 8 * len(table)
    return _HEAD.pack(shift, base) + table, bits
