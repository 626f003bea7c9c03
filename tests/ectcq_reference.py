"""A decoder of ECTCQ streams in plain NumPy and Python, written from docs/bitstream.md alone.

Slow and clear: one weight at a time, no tables but those of the format.
"""

import struct

import numpy as np
from numpy.typing import NDArray

POLYNOMIALS = {8: (0o13, 0o4), 64: (0o103, 0o24), 256: (0o515, 0o362)}


def read_model(private: bytes) -> tuple[int, list[list[tuple[int, int, float]]]]:
    """Number of states, and for each union quantizer its (symbol, frequency, value in steps)."""
    log2_states, evens, odds = private[:3]
    words = struct.unpack_from(f"<{evens + odds}H", private, 3)
    shifts = struct.unpack_from(f"<{evens - 1 + odds}b", private, 3 + 2 * (evens + odds))
    quantizers = []
    for q, (half, shift) in enumerate(
        ((words[:evens], (0, *shifts[: evens - 1])), (words[evens:], shifts[evens - 1 :]))
    ):
        levels = []
        for k, (frequency, s) in enumerate(zip(half, shift, strict=True)):
            value = 2 * k + q + s / 128
            if q == 0 and k == 0:
                levels.append((128, 2 * frequency, 0.0))
            else:
                levels.append((128 + k, frequency, value))
                levels.append((128 - q - k, frequency, -value))
        quantizers.append(sorted(levels))
    return 2**log2_states, quantizers


def read_column_models(
    private: bytes, cols: int
) -> tuple[int, list[list[list[tuple[int, int, float]]]], list[int]]:
    """Number of states, each class's quantizers as of `read_model`, each group's class."""
    log2_states, count = private[0] - 128, private[1]
    place, classes = 2, []
    for _ in range(count):
        size = 2 + 3 * (private[place] + private[place + 1]) - 1
        model = bytes([log2_states]) + private[place : place + size]
        classes.append(read_model(model)[1])
        place += size
    groups = -(-cols // 32)
    nibbles = [n for byte in private[place:] for n in (byte & 15, byte >> 4)]
    assert len(private) - place == -(-groups // 2)
    assert not any(nibbles[groups:])
    return 2**log2_states, classes, nibbles[:groups]


def decode_columns(
    payload: bytes, private: bytes, step: float, shape: tuple[int, int]
) -> NDArray[np.float32]:
    """The weights of a tile of a stream by columns, (rows, cols) in coded order, before scales."""
    rows, cols = shape
    states, classes, of_group = read_column_models(private, cols)
    h0, h1 = POLYNOMIALS[states]
    (tail,) = struct.unpack_from("<I", payload)
    x = list(struct.unpack_from("<32I", payload, 4))
    position = 4 + 4 * 32
    out = np.zeros((rows, 32 * len(of_group)), np.float32)
    for group, number in enumerate(of_group):
        trellis = [0] * 32
        for row in range(rows):
            for lane in range(32):
                q = trellis[lane] & 1
                slot = x[lane] & 4095
                start = 0
                for symbol, frequency, value in classes[number][q]:  # noqa: B007
                    if slot < start + frequency:
                        break
                    start += frequency
                out[row, 32 * group + lane] = np.float32(value * step)
                x[lane] = frequency * (x[lane] >> 12) + slot - start
                following = trellis[lane] >> 1
                if q:
                    following ^= h0 >> 1
                if symbol & 1:
                    following ^= h1 >> 1
                trellis[lane] = following
                if group * rows + row < rows * len(of_group) - tail and x[lane] < 2**16:
                    (word,) = struct.unpack_from("<H", payload, position)
                    x[lane] = x[lane] << 16 | word
                    position += 2
    assert position == len(payload)
    return out[:, :cols]


def decode(payload: bytes, private: bytes, step: float, count: int) -> NDArray[np.float32]:
    """The `count` weights of a tile, before scales."""
    states, quantizers = read_model(private)
    h0, h1 = POLYNOMIALS[states]
    slots: list[list[tuple[int, int, int, float]]] = []
    for levels in quantizers:
        table: list[tuple[int, int, int, float]] = []
        for symbol, frequency, value in levels:
            start = len(table)
            table += [(symbol, frequency, start, value)] * frequency
        assert len(table) == 4096
        slots.append(table)

    (tail,) = struct.unpack_from("<I", payload)
    x = list(struct.unpack_from("<32I", payload, 4))
    trellis = [0] * 32
    position = 4 + 4 * 32
    steps = -(-count // 32)
    out = np.zeros(steps * 32, np.float32)
    for t in range(steps):
        for lane in range(32):
            q = trellis[lane] & 1
            slot = x[lane] & 4095
            symbol, frequency, start, value = slots[q][slot]
            out[32 * t + lane] = np.float32(value * step)
            x[lane] = frequency * (x[lane] >> 12) + slot - start
            following = trellis[lane] >> 1
            if q:
                following ^= h0 >> 1
            if symbol & 1:
                following ^= h1 >> 1
            trellis[lane] = following
            if t < steps - tail and x[lane] < 2**16:
                (word,) = struct.unpack_from("<H", payload, position)
                x[lane] = x[lane] << 16 | word
                position += 2
    assert position == len(payload)
    return out[:count]
