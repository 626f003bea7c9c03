"""Time that `import torch` takes longer where torchcodec_weights is installed.

    python benchmarks/autoload.py --json benchmarks/results/autoload.json

PyTorch loads our entry point and calls it. Each turn is a fresh process that has imported torch
without entry points (TORCH_DEVICE_BACKEND_AUTOLOAD=0), loads the entry point and calls it, as
PyTorch does, and then asks our finder of modules, which is asked at every import, for a module that
is not its own.
"""

import json
import os
import statistics
import subprocess
import sys

from common import machine, parser, write

PROGRAM = """
import sys, time
from importlib.metadata import entry_points
import torch

(ours,) = (e for e in entry_points(group="torch.backends") if e.name == "torchcodec_weights")
start = time.perf_counter()
register = ours.load()
loaded = time.perf_counter()
register()
registered = time.perf_counter()
assert "torchcodec_weights" not in sys.modules
finder = sys.meta_path[0]
began = time.perf_counter()
for _ in range(100_000):
    finder.find_spec("collections.abc")
print(loaded - start, registered - loaded, (time.perf_counter() - began) / 100_000)
"""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=15)
    args = options.parse_args()
    taken: list[list[float]] = []
    for _ in range(args.turns):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
            capture_output=True,
            text=True,
            check=True,
        )
        taken.append([float(number) for number in done.stdout.split()])
    load, register, find = zip(*taken, strict=True)
    both = [a + b for a, b in zip(load, register, strict=True)]
    rows = {
        "turns": args.turns,
        "machine": machine(),
        "load_ms": 1000 * statistics.median(load),
        "register_ms": 1000 * statistics.median(register),
        "both_ms": 1000 * statistics.median(both),
        "both_ms_max": 1000 * max(both),
        "asked_for_a_module_us": 1e6 * statistics.median(find),
    }
    print(json.dumps(rows, indent=2))
    write(args.json, rows)


if __name__ == "__main__":
    main()
