"""ECTCQ's decoder by the level of this machine's instruction set beside another, in the same run.

    python benchmarks/speed.py --level avx2 --json benchmarks/results/speed.json

Matrices of benchmarks/ectcq_columns.py at about 2, 3 and 5 bits, in both streams, one thread:
decoded to float32 and to bfloat16, and multiplied by one token, checksums and all included. The two
levels take turns; times are medians in nanoseconds per weight, and the ratio is the median over the
turns of the other level's time over the best's. What they decode is compared bit for bit.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import ectcq_columns
import numpy as np
import torch
from common import machine, parser, seconds, write
from tqdm.auto import tqdm

from torchcodec_weights.codecs.common.compiled import LEVELS, best_level, matrix_view
from torchcodec_weights.codecs.ectcq import column_kernels, kernels
from torchcodec_weights.codecs.ectcq.columns import decoder_classes_of_matrix
from torchcodec_weights.codecs.ectcq.model import tables_of_matrix
from torchcodec_weights.codecs.records import StoredMatrix

_STEPS = (0.55, 0.265, 0.065)  # of the weights' deviation
_TURNS = 21
_SHAPES = ((1536, 576), (4096, 4096))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--level", choices=LEVELS[: best_level()], default="avx2")
    args = options.parse_args()
    other, best = LEVELS.index(args.level), best_level()
    print(f"nanoseconds per weight: {LEVELS[other]}, {LEVELS[best]}, ratio")
    results = []
    for step in _STEPS:
        for shape in tqdm(_SHAPES):
            for name, matrix in ectcq_columns.streams(shape, step).items():
                results += _compared(name, matrix, other, best)
    write(args.json, {"machine": machine(), "levels": [args.level, LEVELS[best]], "rows": results})


def _compared(name: str, matrix: StoredMatrix, other: int, best: int) -> list[dict[str, Any]]:
    rows, cols = matrix.rows, matrix.cols
    x = np.random.default_rng(0).standard_normal((1, cols)).astype(np.float32)
    view = matrix_view(matrix, range(len(matrix.offsets)))
    columns = name == "columns"
    tables: Any = decoder_classes_of_matrix(matrix) if columns else tables_of_matrix(matrix)
    # Of the same arguments.
    decode: Any = column_kernels.decode_matrix if columns else kernels.decode_matrix
    multiply: Any = column_kernels.multiply_matrix if columns else kernels.multiply_matrix
    results = []
    for what in ("float32", "bfloat16", "product"):
        outs = {level: torch.empty(rows, cols) for level in (other, best)}
        if what == "bfloat16":
            outs = {level: out.to(torch.bfloat16) for level, out in outs.items()}
        calls: dict[int, Callable[[], Any]] = {}
        for level, out in outs.items():
            if what == "product":
                y = np.empty((1, rows), np.float32)
                calls[level] = partial(multiply, tables, view, x, y, 1, level)
            else:
                calls[level] = partial(decode, tables, view, out.data_ptr(), what, 1, level)
        times: dict[int, list[float]] = {level: [] for level in calls}
        for turn in range(_TURNS + 1):
            for level, call in calls.items():
                taken = seconds(call, 1)[1]
                times[level] += taken if turn else []  # the first is of cold memory
        if what != "product":
            assert torch.equal(outs[other], outs[best])
        old, new = (1e9 * statistics.median(times[level]) / rows / cols for level in (other, best))
        ratio = statistics.median(a / b for a, b in zip(times[other], times[best], strict=True))
        bits = 8 * len(matrix.data) / rows / cols
        results.append(
            {"stream": name, "shape": (rows, cols), "bits": bits, "what": what,
             LEVELS[other]: old, LEVELS[best]: new, "ratio": ratio}
        )  # fmt: skip
        tqdm.write(
            f"{name:8}{rows:5} x {cols:4} {bits:5.2f} bits  {what:9}{old:6.3f} {new:6.3f} "
            f"{ratio:5.2f}"
        )
    return results


if __name__ == "__main__":
    main()
