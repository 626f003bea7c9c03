"""Decoding speed by codec and threads, encoding effort, and memory of decoding one layer.

    python benchmarks/throughput.py --json benchmarks/results/throughput.json

Gaussian weights of 2048 x 2048 at 2 bits. One thread and two are timed in turns in the same run,
and their ratio is taken in each turn; the median is printed. Memory is what the resident set of
this process rises by, at its peak, while a layer is decoded (Linux only).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torchcodec_weights.decoding import Window, decode_matrix, open_matrix
from tqdm.auto import tqdm

from torchcodec_weights import CodecTensor, available_codecs, codec_weight_only
from torchcodec_weights.codecs.base import Codec
from torchcodec_weights.tiling import tile_count
from torchcodec_weights.workers import core_count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codec", nargs="*", help="default: all, with their default presets")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    weight = torch.randn(args.size, args.size, generator=torch.Generator().manual_seed(0))
    names = args.codec or [info.name for info in available_codecs() if info.encoder]
    rows = []
    print(
        "codec    encodes  encode Mw/s  decode Mw/s: 1 thread 2 threads  ratio  memory MB (allowed)"
    )
    for name in tqdm(names):
        row = _measure(name, weight, args.bits, args.turns)
        rows.append(row)
        tqdm.write(
            f"{name:8} {row['encodes_per_weight']:7.2f} {row['encode']:12.2f} "
            f"{row['decode'][1]:22.1f} {row['decode'][2]:10.1f} {row['ratio']:6.2f} "
            f"{row['memory_bytes'] / 1e6:11.1f} ({row['allowed_bytes'] / 1e6:.1f})"
        )
    print("Mw/s: million weights per second")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def _measure(name: str, weight: torch.Tensor, bits: float, turns: int) -> dict[str, Any]:
    encoded = [0]
    codec_class: type[Codec] = type(codec_weight_only(name, bits=bits).resolve()[0])
    original = codec_class.encode

    def counting(self: Codec, tile: Any, *args: Any) -> Any:
        encoded[0] += tile.size
        return original(self, tile, *args)

    codec_class.encode = counting  # type: ignore[method-assign]
    start = time.perf_counter()
    coded = CodecTensor.from_hp(weight, codec_weight_only(name, bits=bits))
    encode_seconds = time.perf_counter() - start
    codec_class.encode = original  # type: ignore[method-assign]

    matrix = open_matrix(*coded.coded)
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(turns):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            start = time.perf_counter()
            decode_matrix(matrix, Window(*coded.part), torch.float32)
            times[threads].append(time.perf_counter() - start)
    ratio = statistics.median(one / two for one, two in zip(times[1], times[2], strict=True))
    tile_bytes = weight.nbytes / tile_count(
        *weight.shape, matrix.codec.weights_per_tile(weight.shape[1])
    )
    return {
        "codec": name,
        "bits": coded.bits_per_weight,
        "encodes_per_weight": encoded[0] / weight.numel(),
        "encode": weight.numel() / encode_seconds / 1e6,
        "decode": {n: weight.numel() / statistics.median(times[n]) / 1e6 for n in (1, 2)},
        "ratio": ratio,
        "memory_bytes": _decode_memory(coded),
        "allowed_bytes": weight.nbytes + 2 * tile_bytes,
        "cores": core_count(),
    }


_DECODE = """
import sys, torch
from pathlib import Path
import torchcodec_weights

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.set_num_threads(2)
coded, small = torch.load(sys.argv[1], weights_only=True)
small.dequantize()  # what a first use takes once: the decoder's library and the threads
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (proc(5))
before = status("VmRSS")
coded.dequantize()
print(status("VmHWM") - before)
"""


def _decode_memory(coded: CodecTensor) -> int:
    """Rise of a fresh process's resident set, at its peak, while it decodes."""
    config = codec_weight_only(coded.codec, step=1.0)
    small = CodecTensor.from_hp(torch.randn(64, 64), config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coded.pt"
        torch.save([coded, small], path)
        command = [sys.executable, "-c", _DECODE, str(path)]
        decoded = subprocess.run(command, check=True, capture_output=True, text=True)
        return int(decoded.stdout)


if __name__ == "__main__":
    main()
