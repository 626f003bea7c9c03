"""Time of loading a compressed file, against another version of this package.

    git worktree add --detach ../before REVISION
    cmake -S ../before -B build/before && cmake --build build/before
    cp build/before/libcodecs.so ../before/torchcodec_weights/codecs/
    python benchmarks/loading.py --against ../before --json benchmarks/results/loading.json

Each version writes a file of weights of the shapes of SmolLM2-135M, random, in `ectcq` at 3 bits,
and loads it, in a process of its own by turns: `load_file`, and that with a first use of each
weight (one row, of one tile). The ratio is that of the fastest loads in a turn; the median of all
turns counts. REVISION d43f91c is the one before files were checked. Its library has to be built, as
that of today has other functions.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import machine, parser, write

SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
LAYERS = 30
TREE = """
import sys, time
sys.meta_path = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
sys.path.insert(0, sys.argv[1])
import torch
import torchcodec_weights
assert torchcodec_weights.__file__.startswith(sys.argv[1]), torchcodec_weights.__file__
"""
MAKE = f"""
torch.manual_seed(0)
weights = {{
    f"layers.{{layer}}.{{index}}.weight": torch.randn(shape)
    for layer in range({LAYERS})
    for index, shape in enumerate({SHAPES})
}}
try:
    from torchcodec_weights.models.quantize import encode_tensors
except ImportError:  # versions up to 0.1.0
    from torchcodec_weights.quantize import encode_tensors
config = torchcodec_weights.codec_weight_only(bits=3, preset="fast")
torchcodec_weights.save_file(encode_tensors(weights, config), sys.argv[2])
"""
LOAD = """
# Versions up to 0.1.0 kept parsed headers: to them the second load would be of a known file.
parse = getattr(getattr(torchcodec_weights, "container", None), "_parse", None)
best = [9e9, 9e9]
for turn in range(int(sys.argv[3])):
    if parse:
        parse.cache_clear()
    start = time.perf_counter()
    tensors = torchcodec_weights.load_file(sys.argv[2])
    loaded = time.perf_counter()
    for tensor in tensors.values():
        torch.nn.functional.embedding(torch.tensor([0]), tensor)
    used = time.perf_counter()
    best = [min(best[0], loaded - start), min(best[1], used - start)]
print(*best)
"""


def run(code: str, tree: Path, *arguments: object) -> list[float]:
    """Run code with the package of a tree; the numbers that it prints."""
    command = [sys.executable, "-c", TREE + code, str(tree.resolve()), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(number) for number in done.stdout.split()]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--against", type=Path, required=True, help="tree of the other version")
    options.add_argument("--turns", type=int, default=15)
    options.add_argument("--loads", type=int, default=10, help="in each process")
    args = options.parse_args()
    here = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "ours.safetensors", Path(folder) / "theirs.safetensors"
        run(MAKE, here, files[0])
        run(MAKE, args.against, files[1])
        size = files[0].stat().st_size
        ours, theirs = [], []
        for _ in range(args.turns):
            ours.append(run(LOAD, here, files[0], args.loads))
            theirs.append(run(LOAD, args.against, files[1], args.loads))
    rows: dict[str, Any] = {
        "weights": LAYERS * len(SHAPES),
        "bytes": size,
        "turns": args.turns,
        "machine": machine(),
    }
    for index, name in enumerate(("load", "load and first use")):
        ratios = [a[index] / b[index] for a, b in zip(ours, theirs, strict=True)]
        rows[name] = {
            "ms": 1000 * statistics.median(a[index] for a in ours),
            "ms_against": 1000 * statistics.median(b[index] for b in theirs),
            "ratio_median": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    print(json.dumps(rows, indent=2))
    write(args.json, rows)


if __name__ == "__main__":
    main()
