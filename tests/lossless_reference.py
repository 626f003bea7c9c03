"""A decoder of lossless payloads in plain NumPy and Python, written from docs/bitstream.md alone.

Slow and clear: one symbol at a time, no tables but those of the format.
"""

import struct

import numpy as np
from numpy.typing import NDArray

BITS = {"float32": 32, "float16": 16, "bfloat16": 16}


def read_table(data: bytes) -> tuple[list[int], bytes]:
    """Frequencies of the 256 symbols, and the bytes after the table."""
    last, position = data[0], 1
    frequencies: list[int] = []
    while len(frequencies) <= last:
        first = data[position]
        position += 1
        if first == 0:
            frequencies += [0] * (1 + data[position])
            position += 1
        elif first < 128:
            frequencies.append(first)
        else:
            frequencies.append((first & 15) << 8 | data[position])
            position += 1
    assert sum(frequencies) == 4096
    return frequencies + [0] * (256 - len(frequencies)), data[position:]


def decode_stream(data: bytes, frequencies: list[int], count: int) -> NDArray[np.uint8]:
    """The symbols of a stream of 32 lanes."""
    slots: list[tuple[int, int, int]] = []
    for symbol, frequency in enumerate(frequencies):
        start = len(slots)
        slots += [(symbol, frequency, start)] * frequency
    (tail,) = struct.unpack_from("<I", data)
    x = list(struct.unpack_from("<32I", data, 4))
    position = 4 + 4 * 32
    steps = -(-count // 32)
    out = np.zeros(steps * 32, np.uint8)
    for t in range(steps):
        for lane in range(32):
            slot = x[lane] & 4095
            symbol, frequency, start = slots[slot]
            out[32 * t + lane] = symbol
            x[lane] = frequency * (x[lane] >> 12) + slot - start
            if t < steps - tail and x[lane] < 2**16:
                (word,) = struct.unpack_from("<H", data, position)
                x[lane] = x[lane] << 16 | word
                position += 2
    assert position == len(data)
    return out[:count]


def unpack(data: bytes, width: int, count: int) -> NDArray[np.uint8]:
    """The values of a plain plane."""
    groups = -(-count // 128)
    assert len(data) == 16 * width * groups
    out = np.zeros(groups * 128, np.uint8)
    position = 0
    for group in range(groups):
        at = 0
        for bits in (8, 4, 2, 1):
            if width & bits:
                for i in range(128):
                    byte = data[position + i % (16 * bits)]
                    part = byte >> (i // (16 * bits) * bits) & (2**bits - 1)
                    out[128 * group + i] |= part << at
                position += 16 * bits
                at += bits
    return out[:count]


def decode(payload: bytes, private: bytes, dtype: str, count: int) -> NDArray[np.uint64]:
    """Bits of the `count` weights of a tile, before its outliers are put in place."""
    shift, base = struct.unpack_from("<BH", private)
    shared, rest = read_table(private[3:])
    assert not rest
    low_planes = 2 if dtype == "float32" else 0
    middle_width = shift + 1 - 8 * low_planes
    planes = []
    for k in range(2 + low_planes):
        mode, size = struct.unpack_from("<BI", payload)
        data, payload = payload[5 : 5 + size], payload[5 + size :]
        if mode == 0:
            (value,) = data
            plane = np.full(count, value, np.uint8)
        elif mode == 1:
            plane = unpack(data, middle_width if k == 1 else 8, count)
        elif mode == 2:
            frequencies, stream = read_table(data)
            plane = decode_stream(stream, frequencies, count)
        else:
            assert mode == 3
            assert k == 0
            plane = decode_stream(data, shared, count)
        planes.append(plane.astype(np.uint64))
    assert not payload
    symbols, middle, *low = planes
    field = np.where(symbols > 0, symbols + base, 0)
    mantissa = middle & (2 ** (middle_width - 1) - 1)
    for byte in low:
        mantissa = mantissa << 8 | byte
    sign = middle >> (middle_width - 1) & 1
    return sign << (BITS[dtype] - 1) | field << shift | mantissa
