"""Every kernel of ECTCQ's decoder beside the scalar one: compared bit for bit, and timed.

    python benchmarks/kernels.py --json benchmarks/results/kernels.json

Whole matrices on one thread, checksums and all included, in both streams and with alphabets from a
few symbols to more than registers hold. For each instruction set of this machine: decoded to
float32 and to bfloat16, and multiplied by one token and by four. All kernels take turns; times are
medians in nanoseconds of the processor per weight, as others may run on the core meanwhile, and the
ratio is the median over the turns of the scalar kernel's time over the kernel's. Weights must have
the scalar kernel's bits; products must be those of these weights but for the rounding of sums. Ends
with status 1, and names the kernel, where they are not.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import ectcq_columns
import numpy as np
import torch
from common import machine, parser, write
from numpy.typing import NDArray
from tqdm.auto import tqdm

from torchcodec_weights.codecs.common.compiled import LEVELS, best_level, matrix_view
from torchcodec_weights.codecs.ectcq import column_kernels, kernels
from torchcodec_weights.codecs.ectcq.columns import decoder_classes_of_matrix
from torchcodec_weights.codecs.ectcq.model import tables_of_matrix
from torchcodec_weights.codecs.records import StoredMatrix

_STEPS = (1.1, 0.55, 0.265, 0.13, 0.065)  # of the weights' deviation: from 1 to 5 bits
_SHAPE = (1000, 1547)  # neither tiles nor columns fill the kernels' loops
_TURNS = 9
_WHAT = ("float32", "bfloat16", "1 token", "4 tokens")


def main() -> None:
    args = parser(__doc__).parse_args()
    print("symbols at most, bits: nanoseconds per weight, of the scalar kernel's speed")
    rows, wrong = [], []
    for step in tqdm(_STEPS):
        for stream, matrix in ectcq_columns.streams(_SHAPE, step).items():
            for what in _WHAT:
                made = _compared(stream, matrix, what)
                rows += made
                wrong += [row for row in made if not row["same"]]
    write(args.json, {"machine": machine(), "rows": rows})
    for row in wrong:
        print(f"WRONG: {row['kernel']}, {row['stream']}, {row['symbols']} symbols, {row['what']}")
    sys.exit(1 if wrong else 0)


def _compared(stream: str, matrix: StoredMatrix, what: str) -> list[dict[str, Any]]:
    """Each kernel's speed at one task, and whether its results are the scalar one's."""
    shape, count = (matrix.rows, matrix.cols), matrix.rows * matrix.cols
    view = matrix_view(matrix, range(len(matrix.offsets)))
    columns = stream == "columns"
    tables: Any = decoder_classes_of_matrix(matrix) if columns else tables_of_matrix(matrix)
    # Of the same arguments.
    decode: Any = column_kernels.decode_matrix if columns else kernels.decode_matrix
    multiply: Any = column_kernels.multiply_matrix if columns else kernels.multiply_matrix
    levels = range(best_level() + 1)
    tokens = int(what.split()[0]) if "token" in what else 0
    outs: list[torch.Tensor] = []
    calls: list[Callable[[], Any]] = []
    x = np.random.default_rng(0).standard_normal((max(1, tokens), shape[1]))
    scaled = x.astype(np.float32)
    for level in levels:
        if tokens:
            product = np.full((tokens, shape[0]), np.nan, np.float32)
            outs.append(torch.from_numpy(product))
            calls.append(partial(multiply, tables, view, scaled, product, 1, level))
        else:
            outs.append(torch.full(shape, torch.nan, dtype=getattr(torch, what)))
            calls.append(partial(decode, tables, view, outs[-1].data_ptr(), what, 1, level))
    times: list[list[float]] = [[] for _ in levels]
    for turn in range(_TURNS + 1):
        for level in levels:
            start = time.process_time()
            calls[level]()
            if turn:  # the first is of cold memory
                times[level].append(time.process_time() - start)
    if tokens:
        weight = torch.empty(shape)
        decode(tables, view, weight.data_ptr(), "float32", 1, 0)
        same = [_is_product(out.numpy(), weight.numpy(), scaled) for out in outs]
    else:
        same = [torch.equal(out.view(torch.uint8), outs[0].view(torch.uint8)) for out in outs]
    symbols, bits = _symbols(tables, columns), 8 * len(matrix.data) / count
    rows = []
    for level in levels:
        nanoseconds = 1e9 * statistics.median(times[level]) / count
        ratio = statistics.median(a / b for a, b in zip(times[0], times[level], strict=True))
        rows.append(
            {"kernel": LEVELS[level], "stream": stream, "symbols": symbols, "bits": bits,
             "what": what, "ns": nanoseconds, "ratio": ratio, "same": same[level]}
        )  # fmt: skip
    speeds = "  ".join(f"{row['kernel']} {row['ns']:.3f} {row['ratio']:5.2f}" for row in rows)
    tqdm.write(f"{stream:8}{symbols:4} {bits:5.2f}  {what:9}{speeds}")
    return rows


def _is_product(
    product: NDArray[np.float32], weight: NDArray[np.float32], x: NDArray[np.float32]
) -> bool:
    """Whether it is one but for what float32 rounds, at worst, in additions in any order."""
    wide, other = weight.astype(np.float64), x.astype(np.float64).T
    bound = 2.0**-24 * weight.shape[1] * (np.abs(wide) @ np.abs(other))
    return bool((np.abs(product - (wide @ other).T) <= bound.T).all())


def _symbols(tables: Any, columns: bool) -> int:
    """Symbols of the largest alphabet, from its first to its last."""
    if columns:
        parts = [np.array(one.frequency) for one in tables.classes]
        there = np.concatenate([part.reshape(2, -1) for part in parts]) > 0
        return int(max(np.ptp(np.flatnonzero(row)) + 1 for row in there))
    symbol = np.array(tables.slots, np.uint32).reshape(2, -1) >> 24
    return int((symbol.max(1) - symbol.min(1) + 1).max())


if __name__ == "__main__":
    main()
