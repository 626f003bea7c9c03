"""What the image standards' own tools do to noise, beside what codecs/image/ makes of them.

    python benchmarks/image_settings.py

Payload bits per weight and SNR of one Gaussian tile of 512 x 512, at 2 bits or nearly.
The signal is taken to have the variance one of the distribution; the tile itself has 0.015 dB less.
"""

from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.base import Codec
from torchcodec_weights.codecs.records import EncoderSettings
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.encoder.rate import DB_PER_BIT

TILE = np.random.default_rng(0).standard_normal((512, 512), np.float32)
Stream = bytes | bytearray
Encode = Callable[[float], tuple[Stream, NDArray[np.float64]]]
Options = dict[str, Any]


def main() -> None:
    print(f"{'codec':9} {'settings':38} {'bits':>6} {'SNR dB':>7} {'gap dB':>7}")
    for codec, name, encode, values in settings():
        # The knob is not the same for all; the value nearest to 2 bits is what is compared.
        results = []
        for value in values:
            stream, decoded = encode(value)
            rate = 8 * len(stream) / TILE.size
            snr_db = -10 * np.log10(np.mean((decoded - TILE) ** 2))
            results.append((abs(rate - 2), rate, snr_db))
        _, rate, snr_db = min(results)
        gap_db = DB_PER_BIT * rate - snr_db
        print(f"{codec:9} {name:38} {rate:6.3f} {snr_db:7.2f} {gap_db:7.2f}", flush=True)


def settings() -> list[tuple[str, str, Encode, NDArray[np.float64]]]:
    """Codec, what it does, how, and the values of its knob to try."""
    steps = np.linspace(0.9, 1.7, 17)
    rows: list[tuple[str, str, Encode, NDArray[np.float64]]] = [
        ("jpeg", "its table for the eye", own_table, np.arange(10.0, 80.0, 3.0)),
        ("jpeg", "all steps 1, samples rounded to steps", all_ones, steps),
    ]
    rows += [
        (
            "jpeg2000",
            f"9/7, wavelet levels: {levels}, truncated",
            truncated(levels),
            np.arange(36.0, 44, 0.5),
        )
        for levels in (5, 1)
    ]
    rows += [
        ("jpeg2000", f"rounded, 5/3, wavelet levels: {levels}", reversible(levels), steps)
        for levels in (5, 1)
    ]
    rows += [
        ("htj2k", f"9/7, wavelet levels: {levels}", irreversible(levels), np.linspace(0.6, 1.1, 17))
        for levels in (5, 1)
    ]
    rows += [
        ("htj2k", "rounded, 5/3, wavelet levels: 1", ht_reversible, steps),
        ("jpegxl", "VarDCT, effort 7", var_dct, np.linspace(1.0, 5.0, 17)),
    ]
    rows += [
        ("jpegxl", f"rounded to {depth} bits, effort 6", modular(depth), steps)
        for depth in (16, 12, 10)
    ]
    for codec in ("jpeg", "jpeg2000", "htj2k", "jpegxl"):
        for preset in get_codec(codec).presets or (None,):
            rows.append((codec, f"here {preset or ''}", here(codec, preset), steps))
    return rows


def samples(scale: float, depth: int) -> NDArray[np.uint16]:
    middle = 2 ** (depth - 1)
    kind = np.uint8 if depth == 8 else np.uint16
    return np.clip(np.rint(TILE * scale) + middle, 0, 2 * middle - 1).astype(kind)


def values(frame: NDArray[np.uint16], scale: float, depth: int) -> NDArray[np.float64]:
    return (frame.astype(np.float64) - 2 ** (depth - 1)) / scale


def own_table(quality: float) -> tuple[Stream, NDArray[np.float64]]:
    stream = imagecodecs.jpeg8_encode(samples(25, 8), int(quality), optimize=True)
    return stream, values(imagecodecs.jpeg8_decode(stream), 25, 8)


def all_ones(step: float) -> tuple[Stream, NDArray[np.float64]]:
    stream = imagecodecs.jpeg8_encode(samples(1 / step, 8), 100, optimize=True)
    return stream, values(imagecodecs.jpeg8_decode(stream), 1 / step, 8)


def truncated(levels: int) -> Encode:
    def encode(psnr: float) -> tuple[Stream, NDArray[np.float64]]:
        options: Options = {"level": psnr, "reversible": False, "codecformat": "j2k"}
        stream = imagecodecs.jpeg2k_encode(samples(2000, 16), resolutions=levels + 1, **options)
        return stream, values(imagecodecs.jpeg2k_decode(stream), 2000, 16)

    return encode


def reversible(levels: int) -> Encode:
    def encode(step: float) -> tuple[Stream, NDArray[np.float64]]:
        options: Options = {"reversible": True, "resolutions": levels + 1, "codecformat": "j2k"}
        stream = imagecodecs.jpeg2k_encode(samples(1 / step, 8), **options)
        return stream, values(imagecodecs.jpeg2k_decode(stream), 1 / step, 8)

    return encode


def irreversible(levels: int) -> Encode:
    def encode(step: float) -> tuple[Stream, NDArray[np.float64]]:
        options: Options = {"reversible": False, "resolutions": levels}
        stream = imagecodecs.htj2k_encode(samples(2000, 16), step * 2000 / 2**16, **options)
        return stream, values(imagecodecs.htj2k_decode(stream), 2000, 16)

    return encode


def ht_reversible(step: float) -> tuple[Stream, NDArray[np.float64]]:
    stream = imagecodecs.htj2k_encode(samples(1 / step, 8), reversible=True, resolutions=1)
    return stream, values(imagecodecs.htj2k_decode(stream), 1 / step, 8)


def var_dct(distance: float) -> tuple[Stream, NDArray[np.float64]]:
    stream = imagecodecs.jpegxl_encode(samples(25, 8), distance=distance, effort=7)
    return stream, values(imagecodecs.jpegxl_decode(stream), 25, 8)


def modular(depth: int) -> Encode:
    def encode(step: float) -> tuple[Stream, NDArray[np.float64]]:
        options: Options = {"lossless": True, "effort": 6, "bitspersample": depth}
        stream = imagecodecs.jpegxl_encode(samples(1 / step, depth), **options)
        return stream, values(imagecodecs.jpegxl_decode(stream), 1 / step, depth)

    return encode


def here(name: str, preset: str | None) -> Encode:
    codec = get_codec(name)
    assert isinstance(codec, Codec)

    def encode(step: float) -> tuple[Stream, NDArray[np.float64]]:
        coded = codec.encode(TILE, step, float(np.abs(TILE).max()), b"", EncoderSettings(preset))
        out = np.empty_like(TILE)
        codec.decode(coded.payload, coded.unit, b"", TILE.shape, out)
        return coded.payload, out.astype(np.float64)

    return encode


if __name__ == "__main__":
    main()
