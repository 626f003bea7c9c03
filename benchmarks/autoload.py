"""Time that `import torch` takes longer where torchcodec_weights is installed.

    python benchmarks/autoload.py --json benchmarks/results/autoload.json

PyTorch loads our entry point and calls it. Each turn is a fresh process that has imported torch
without entry points (TORCH_DEVICE_BACKEND_AUTOLOAD=0), loads the entry point and calls it, as
PyTorch does, and then asks our finder of modules, which is asked at every import, for a module that
is not its own. A turn before these writes the bytecode of the module, as pip does when it installs.
Times are processor time of the thread, of which other programs on the machine take nothing.
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
start = time.thread_time()
register = ours.load()
loaded = time.thread_time()
register()
registered = time.thread_time()
assert "torchcodec_weights" not in sys.modules
finder = sys.meta_path[0]
began = time.thread_time()
for _ in range(100_000):
    finder.find_spec("collections.abc")
print(loaded - start, registered - loaded, (time.thread_time() - began) / 100_000)
"""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=15)
    args = options.parse_args()
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    taken: list[list[float]] = []
    for _ in range(args.turns + 1):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        taken.append([float(number) for number in done.stdout.split()])
    load, register, find = zip(*taken[1:], strict=True)
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
