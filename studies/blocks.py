"""Blocks of a matrix with steps of their own, beside tiles of whole rows: error at the same bits.

    python studies/blocks.py --json studies/results/blocks.json

Weights: the six matrices of layer 3 of all-MiniLM-L6-v2, SNR over all of them together.
Rows that the JSON file holds already are not measured again.
"""

import argparse
from pathlib import Path

import torch
from tqdm.auto import tqdm

from torchcodec_weights import CodecTensor, RateError, codec_weight_only
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.evaluation.models import minilm_weights
from torchcodec_weights.evaluation.rows import Row, Rows
from torchcodec_weights.evaluation.snr import snr_db

SIDES = (None, 384, 192, 96, 48)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codec", nargs="*", default=["ectcq", "h264", "jpegxl"])
    parser.add_argument("--bits", nargs="*", type=float, default=[2.0, 3.0, 4.0])
    parser.add_argument("--json", type=Path, help="rows are read from there and written to it")
    args = parser.parse_args()
    weights = [
        weight
        for name, weight in minilm_weights().items()
        if name.startswith("encoder.layer.3.") and weight.dim() == 2
    ]
    rows = Rows(args.json)
    print(f"{'codec':8} {'bits':>4} {'tile':>10} {'steps':>8} {'stored':>7} {'SNR dB':>7}")
    for codec in args.codec:
        kinds = ["uniform", "adaptive"] if get_codec(codec).adapts_steps else ["uniform"]
        for bits in args.bits:
            for side in tqdm(SIDES, desc=f"{codec} {bits:g}", leave=False):
                for kind in kinds:
                    key = {"codec": codec, "asked": bits, "side": side, "steps": kind}
                    row = rows.find(key)
                    if row is None:
                        row = key | _measure(weights, codec, bits, side, kind)
                        rows.add(row)
                    tile = "whole rows" if side is None else f"{side} x {side}"
                    found = row.get("error") or f"{row['bits']:7.3f} {row['snr_db']:7.2f}"
                    tqdm.write(f"{codec:8} {bits:4g} {tile:>10} {kind:>8} {found}")


def _measure(
    weights: list[torch.Tensor], codec: str, bits: float, side: int | None, kind: str
) -> Row:
    shape = None if side is None else [side, side]
    preset = next(iter(get_codec(codec).presets), None)
    config = codec_weight_only(codec, bits=bits, preset=preset, tile_shape=shape, tile_steps=kind)
    coded = []
    for weight in weights:
        try:
            coded.append(CodecTensor.from_hp(weight, config))
        except RateError as failure:
            return {"error": str(failure)}
    stored = 8 * sum(tensor.stored_bytes for tensor in coded)
    decoded = (tensor.dequantize() for tensor in coded)
    return {
        "bits": stored / sum(weight.numel() for weight in weights),
        "snr_db": snr_db(zip(weights, decoded, strict=True)),
    }


if __name__ == "__main__":
    main()
