"""What decoding pictures in worker processes costs (`isolated_decoders`).

    python benchmarks/isolation.py --json benchmarks/results/isolation.json

Decodes a weight of 1024 × 1024 at 4 bits with and without, by turns; the ratio is of the medians.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from torchcodec_weights import CodecTensor, codec_weight_only, isolated_decoders


def seconds(weight: CodecTensor) -> float:
    """Of one decode."""
    start = time.perf_counter()
    weight.dequantize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codecs", nargs="+", default=["h264", "av1", "jpeg", "jpegxl"])
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    values = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    for codec in args.codecs:
        weight = CodecTensor.from_hp(values, codec_weight_only(codec, bits=4, preset=None))
        here, apart = [], []
        for _ in range(args.turns):
            here.append(seconds(weight))
            with isolated_decoders():
                weight.dequantize()  # the workers start
                apart.append(seconds(weight))
        ratio = statistics.median(apart) / statistics.median(here)
        rows.append({"codec": codec, "ms": 1000 * statistics.median(here), "ratio": ratio})
        print(f"{codec:10} {rows[-1]['ms']:8.2f} ms  x {ratio:.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
