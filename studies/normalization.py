"""What normalization, and the gain of decoded weights, do to SmolLM2-135M at equal bits.

    python studies/normalization.py --json studies/results/normalization.json

Rows that the JSON file holds already are not measured again. A variant is how rows and columns are
scaled (`r1c1`: by their root mean squares to the powers of 1 and 1, the package's own, `r1c0`: rows
alone, `r0c0`: one scale), `nosigns`, `means` (row means always taken out), `nomeans` (never), or
`hadamard` (random rotations of 64 columns each before coding, undone after). A gain of `0.5` takes
decoded weights times the square root of what would make them unbiased, `1` the whole of it.
Perplexity at 2 bits scatters with the random signs, so that several seeds are measured.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from smollm2 import SmolLM2
from torch import Tensor

from torchcodec_weights import codec_weight_only
from torchcodec_weights.codecs.records import FloatArray
from torchcodec_weights.encoder.encode import Normalizer
from torchcodec_weights.evaluation.recoding import recode
from torchcodec_weights.evaluation.rows import Row, Rows
from torchcodec_weights.evaluation.snr import snr_db
from torchcodec_weights.matrix.normalize import (
    LEAST_GAIN,
    SIGN_SEED,
    CodedScale,
    Equalized,
    coding_gain,
    decode_scale,
    encode_scale,
    normalize,
    robust_rms,
)

VARIANTS: tuple[str, ...] = (
    "r1c1",
    "r1c0",
    "r0c1",
    "r0c0",
    "r1c.5",
    "r.5c1",
    "r.5c.5",
    "r1c.75",
    "r.75c1",
)
VARIANTS += ("nosigns", "means", "nomeans", "hadamard")
_BLOCK = 64


def equalizer(
    row_power: float, col_power: float, signs: bool
) -> Callable[[FloatArray, float | None, int], Equalized]:
    """Equalization by powers of root mean squares, with random signs or without."""

    def scale(
        z: FloatArray, threshold: float | None, rng: np.random.Generator, axis: int, power: float
    ) -> CodedScale:
        rms = robust_rms(z, threshold, axis)
        one = robust_rms(z.reshape(1, -1), threshold, 1)
        alike = coding_gain(rms, z.shape[axis]) < LEAST_GAIN * len(rms)
        if power == 0 or alike:
            rms = one
        rms = rms**power * one ** (1 - power)
        drawn = rng.integers(0, 2, len(rms), np.uint8)
        return encode_scale(rms, drawn if signs else np.zeros_like(drawn))

    def equalize(w: FloatArray, threshold: float | None, seed: int) -> Equalized:
        rng = np.random.Generator(np.random.PCG64(seed))
        rows = scale(w, threshold, rng, 1, row_power)
        z = w / decode_scale(*rows)[:, None]
        cols = scale(z, threshold, rng, 0, col_power)
        z /= decode_scale(*cols)
        rest = float(robust_rms(z.reshape(1, -1), threshold, 1)[0])
        z /= np.float32(rest)
        return z, (rows[0], rows[1] * rest), cols

    return equalize


def every_row_mean(w: FloatArray) -> FloatArray:
    return w.mean(axis=1, dtype=np.float64).astype(np.float32)


def no_row_mean(w: FloatArray) -> None:
    return None


def normalizer(variant: str) -> Normalizer:
    """The normalization of a variant."""
    if variant == "nosigns":
        return partial(normalize, equalize=equalizer(1, 1, signs=False))
    if variant == "means":
        return partial(normalize, row_offsets=every_row_mean)
    if variant == "nomeans":
        return partial(normalize, row_offsets=no_row_mean)
    if variant in ("r1c1", "hadamard"):
        return normalize
    rows, cols = map(float, variant[1:].split("c"))
    return partial(normalize, equalize=equalizer(rows, cols, signs=True))


def rotated(weight: Tensor, seed: int, *, back: bool = False) -> Tensor:
    """Blocks of columns times random signs, then a Hadamard matrix; or the inverse of that."""
    rotation = torch.ones(1, 1)
    while len(rotation) < _BLOCK:
        rotation = torch.cat(
            [torch.cat([rotation, rotation], 1), torch.cat([rotation, -rotation], 1)]
        )
    rotation = rotation / len(rotation) ** 0.5
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (weight.shape[1],), generator=generator) * 2.0 - 1
    blocks = (weight if back else weight * signs).view(len(weight), -1, _BLOCK)
    turned = (blocks @ (rotation.T if back else rotation)).reshape(weight.shape)
    return turned * signs if back else turned


def measure(
    model: SmolLM2,
    codec: str,
    preset: str,
    bits: float,
    variant: str,
    seed: int,
    gains: list[float],
) -> Iterator[Row]:
    turn = variant == "hadamard"
    before = {name: rotated(w, seed) if turn else w for name, w in model.dense.items()}
    config = codec_weight_only(codec, bits=bits, preset=preset)
    configs = dict.fromkeys(before, config)
    stored, after = recode(before, configs, SIGN_SEED + seed, normalizer(variant))
    for gain in gains:
        changed = {}
        for name, weight in after.items():
            scaled = _with_gain(before[name], weight, gain)
            changed[name] = rotated(scaled, seed, back=True) if turn else scaled
        yield {
            "gain": gain,
            "bits_per_weight": stored,
            "snr_db": snr_db((weight, changed[name]) for name, weight in model.dense.items()),
            "perplexity": model.perplexity(changed),
        }


def _with_gain(dense: Tensor, decoded: Tensor, power: float) -> Tensor:
    """Decoded weights times a power of the unbiasing gain; outliers, which are exact, stay."""
    lossy = decoded != dense
    gain = (dense * dense)[lossy].sum() / (dense * decoded)[lossy].sum()
    return torch.where(lossy, decoded * gain**power, decoded)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--bits", nargs="+", type=float, default=[2.0, 3.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--gains", nargs="+", type=float, default=[0.0])
    parser.add_argument("--codec", default="ectcq")
    parser.add_argument("--preset", default="medium")
    parser.add_argument("--tokens", type=int, default=4092)
    parser.add_argument("--json", type=Path, help="rows are read from there and written to it")
    args = parser.parse_args()
    rows = Rows(args.json)
    model: SmolLM2 | None = None
    for bits, seed, variant in product(args.bits, args.seeds, args.variants):
        key = {
            "codec": f"{args.codec}/{args.preset}",
            "tokens": args.tokens,
            "variant": variant,
            "bits": bits,
            "seed": seed,
        }
        missing = [gain for gain in args.gains if rows.find(key | {"gain": gain}) is None]
        if missing:
            model = model or SmolLM2(args.tokens)
            for result in measure(model, args.codec, args.preset, bits, variant, seed, missing):
                rows.add(key | result)
        for gain in args.gains:
            row = rows.find(key | {"gain": gain})
            assert row is not None
            print(
                f"{variant:8} seed {seed} gain {row['gain']:3.1f}: "
                f"{row['bits_per_weight']:.4f} bits, "
                f"{row['snr_db']:.2f} dB, perplexity {row['perplexity']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
