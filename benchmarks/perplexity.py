"""Perplexity, size on disk and memory of SmolLM2-135M by codec and rate, beside other methods.

    python benchmarks/perplexity.py --json benchmarks/results/perplexity.json

Rows that the JSON file holds already are not measured again, so an interrupted run goes on where it
was. All Linear weights but `lm_head` are encoded, the baselines take the same ones. Perplexity is
measured in float32, the state dict is saved in bfloat16 with what is encoded in it; memory is what
the resident set of a fresh process grows by when it loads that file.
"""

import copy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from baselines import BASELINES, quantize
from common import parser
from torch import Tensor, nn
from torchao.quantization import FqnToConfig
from tqdm.auto import tqdm

from torchcodec_weights import codec_weight_only, compression_report, decompress_, quantize_
from torchcodec_weights.evaluation.choices import TOKENS
from torchcodec_weights.evaluation.metrics import measure
from torchcodec_weights.evaluation.models import encoded_weights, load_smollm2
from torchcodec_weights.evaluation.rows import Row, Rows

DEFAULT = ["dense", "rtn:2", "rtn:3", "rtn:4", "hqq:2", "hqq:3", "hqq:4"] + [
    f"{codec}:{bits}" for bits in (2, 3, 4) for codec in ("vvc", "hevc", "h264", "av1", "vp9/fast")
]
_LOAD = """
import sys, torch, torchcodec_weights
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
before = resident()
state = torch.load(sys.argv[1], weights_only=True)
print(resident() - before)
"""


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "methods",
        nargs="*",
        default=DEFAULT,
        help="dense, CODEC[/PRESET][+adaptive]:BITS, or METHOD[/VARIANT]:BITS with one of "
        f"{', '.join(BASELINES)} (baselines.py says what they are)",
    )
    options.add_argument("--tokens", type=int, default=TOKENS)
    args = options.parse_args()
    rows = Rows(args.json)
    print(f"{'method':16} {'bits/weight':>11} {'perplexity':>11} {'disk MB':>8} {'memory MB':>9}")
    for method in tqdm(args.methods, desc="methods"):
        row = rows.find({"method": method, "tokens": args.tokens})
        if row is None:
            row = _measure(method, args.tokens)
            rows.add(row)
        tqdm.write(
            f"{method:16} {row['bits_per_weight']:11.4f} {row['perplexity']:11.2f} "
            f"{row['disk_bytes'] / 1e6:8.1f} {row['memory_bytes'] / 1e6:9.1f}"
        )


def _measure(method: str, tokens: int) -> Row:
    model, tokenizer = load_smollm2()
    name, _, bits = method.partition(":")
    name, _, steps = name.partition("+")
    codec, _, preset = name.partition("/")
    grouped: dict[str, list[Tensor]] = {}
    stored = 16.0
    start = time.perf_counter()
    if codec in BASELINES:
        grouped, stored = _quantize_grouped(model, codec, float(bits or 0), preset)
    elif codec != "dense":
        config = codec_weight_only(
            codec, bits=float(bits), preset=preset or None, tile_steps=steps or "uniform"
        )
        quantize_(model, FqnToConfig(dict.fromkeys(encoded_weights(model), config)))
        stored = compression_report(model).bits_per_weight
    encode_seconds = time.perf_counter() - start
    disk_bytes, memory_bytes = _stored_size(model, grouped)
    decompress_(model)
    return {
        "method": method,
        "tokens": tokens,
        "bits_per_weight": stored,
        "perplexity": measure("perplexity", model, tokenizer, tokens=tokens),
        "disk_bytes": disk_bytes,
        "memory_bytes": memory_bytes,
        "encode_seconds": encode_seconds,
    }


def _quantize_grouped(
    model: nn.Module, name: str, bits: float, variant: str
) -> tuple[dict[str, list[Tensor]], float]:
    """Put decoded weights into the model; returns what would be stored, and its bits per weight."""
    grouped = {}
    stored, weights = 0.0, 0
    for path, weight in tqdm(encoded_weights(model).items(), desc=name, leave=False):
        coded = quantize(weight.data, name, bits, variant)
        weight.data = coded.weight
        if coded.stored:
            grouped[path] = coded.stored
        stored, weights = stored + coded.bits, weights + weight.numel()
    return grouped, stored / weights


def _stored_size(model: nn.Module, grouped: dict[str, list[Tensor]]) -> tuple[int, int]:
    """Bytes of the saved state dict, and of memory that a fresh process takes to hold it."""
    state = copy.deepcopy(model).to(torch.bfloat16).state_dict() | grouped
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.pt"
        torch.save(state, path)
        command = [sys.executable, "-c", _LOAD, str(path)]
        loaded = subprocess.run(command, check=True, capture_output=True, text=True)
        return path.stat().st_size, int(loaded.stdout)


if __name__ == "__main__":
    main()
