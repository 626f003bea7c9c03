"""Decoding speed by codec and threads, encoding effort, and memory of decoding one layer.

    python benchmarks/throughput.py --json benchmarks/results/throughput.json

Gaussian weights of 2048 x 2048 at 2 bits. One thread and two are timed in turns in the same run,
and their ratio is taken in each turn; the median is printed. Memory is what the resident set of
this process rises by, at its peak, while a layer is decoded (Linux only).
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import gaussian, machine, one_and_two_threads, parser, write
from tqdm.auto import tqdm

from torchcodec_weights import CodecTensor, available_codecs, codec_weight_only
from torchcodec_weights.decoders.cpu import decode_matrix
from torchcodec_weights.encoder.encode import encode_matrix
from torchcodec_weights.evaluation.rows import Row
from torchcodec_weights.format.tiling import Window, tile_count
from torchcodec_weights.matrix.opened import open_matrix
from torchcodec_weights.system.workers import encoder_pool


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--codec", nargs="*", help="default: all, with their default presets")
    options.add_argument("--size", type=int, default=2048)
    options.add_argument("--bits", type=float, default=2.0)
    options.add_argument("--turns", type=int, default=9)
    args = options.parse_args()
    weight = gaussian(args.size, args.size)
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
    write(args.json, rows)


def _measure(name: str, weight: torch.Tensor, bits: float, turns: int) -> Row:
    config = codec_weight_only(name, bits=bits)
    codec, target, settings = config.resolve()
    start = time.perf_counter()
    encoded = encode_matrix(weight, codec, target, settings, encoder_pool())
    encode_seconds = time.perf_counter() - start
    coded = CodecTensor(
        encoded.qdata,
        encoded.scale,
        encoded.act_pre_scale,
        list(weight.shape),
        weight.dtype,
        encoded.zero_point,
    )
    matrix = open_matrix(*coded.coded)
    window = Window(*coded.resolved_window)
    times = one_and_two_threads(lambda: decode_matrix(matrix, window, torch.float32), turns)
    rows, cols = weight.shape
    tile_bytes = weight.nbytes / tile_count(rows, cols, matrix.codec.weights_per_tile(cols))
    return {
        "codec": name,
        "bits": coded.bits_per_weight,
        "encodes_per_weight": encoded.encodes,
        "encode": weight.numel() / encode_seconds / 1e6,
        "decode": {
            threads: weight.numel() / taken / 1e6
            for threads, taken in ((1, times.one), (2, times.two))
        },
        "ratio": times.ratio,
        "memory_bytes": _decode_memory(coded),
        "allowed_bytes": weight.nbytes + 2 * tile_bytes,
        "machine": machine(),
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
