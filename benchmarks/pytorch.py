"""What a CodecTensor costs in PyTorch: overhead of a call, memory, prefetch.

    python benchmarks/pytorch.py --json benchmarks/results/pytorch.json

Times of two things are taken in turns, and compared as ratios or differences of each turn.
"""

import copy
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import fastest_preset, machine, parser, write
from torch import Tensor, nn

from torchcodec_weights import CodecTensor, codec_weight_only, decoded_cache, quantize_
from torchcodec_weights.codecs.common.compiled import matrix_view
from torchcodec_weights.codecs.ectcq.kernels import multiply_matrix
from torchcodec_weights.codecs.ectcq.model import tables_of_matrix
from torchcodec_weights.matrix.opened import open_matrix

TURNS = 15


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    args = options.parse_args()
    results = {part: PARTS[part]() for part in args.parts}
    write(args.json, {"machine": machine(), **results})


def _encoded(rows: int, cols: int, codec: str = "ectcq") -> nn.Linear:
    layer = nn.Linear(cols, rows, bias=False)
    config = codec_weight_only(codec, bits=3, preset=fastest_preset(codec))
    quantize_(layer, config, lambda module, name: True)
    return layer


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _cpu_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Of this thread's processor, as others may run on the core meanwhile."""
    start = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - start) / repeats


def _overhead() -> list[dict[str, Any]]:
    """Time of a 64 x 64 layer beyond that of a dense one, one thread: by its bits, and cached."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    quantize_(layer, codec_weight_only(bits=3), lambda module, name: True)
    dense = nn.Linear(64, 64, bias=False)
    x = torch.randn(1, 64)
    depth = 20

    def compiled(module: nn.Module, times: int) -> Callable[[Tensor], Any]:
        layers = [copy.deepcopy(module) for _ in range(times)]
        return torch.compile(nn.Sequential(*layers), fullgraph=True)

    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any], int, int]] = {
        "F.linear, eager": (
            lambda: F.linear(x, layer.weight),
            lambda: F.linear(x, dense.weight),
            1000,
            1,
        ),
    }
    for times in (1, depth):
        ours, theirs = compiled(layer, times), compiled(dense, times)
        name = f"compiled, per layer of a model of {times}"
        calls[name] = partial(ours, x), partial(theirs, x), 2000 // times, times
    rows = []
    print("a 64 x 64 layer over a dense one, µs of the processor: median, least, most")
    for where, budget in (("by its bits", 0), ("cached", 2**20)):
        for name, (ours_call, dense_call, repeats, times) in calls.items():
            with torch.no_grad(), decoded_cache(budget):
                _cpu_seconds(ours_call, 200), _cpu_seconds(dense_call, 200)
                turns = [
                    1e6
                    * (_cpu_seconds(ours_call, repeats) - _cpu_seconds(dense_call, repeats))
                    / times
                    for _ in range(TURNS)
                ]
            rows.append({"call": name, "weight": where, "us": sorted(turns)})
            print(
                f"  {where:12} {name:42} {statistics.median(turns):6.1f} {min(turns):6.1f} "
                f"{max(turns):6.1f}"
            )
    return rows


def _calls() -> list[dict[str, Any]]:
    """Time of `F.linear` over that of its kernel, one token, one thread.

    The kernel multiplies by all tiles, their checksums, outliers and rows' scales included, of
    float32 activations that are multiplied by the columns' scales already.
    """
    torch.set_num_threads(1)
    rows = []
    print("F.linear over its kernel, one token, one thread: µs of the processor, median ratio")
    for size, repeats in ((576, 20), (4096, 1)):
        for bits in (2, 3):
            torch.manual_seed(0)
            dense = torch.randn(size, size)
            weight = CodecTensor.from_hp(dense, codec_weight_only(bits=bits, preset="fast"))
            x = torch.randn(1, size)
            stored = open_matrix(*weight.coded).stored()
            view, tables = matrix_view(stored, range(len(stored.crcs))), tables_of_matrix(stored)
            scaled = (x.numpy() * stored.col_scale).astype(np.float32)
            product = np.empty((1, size), np.float32)
            kernel = partial(multiply_matrix, tables, view, scaled, product, 1)
            for dtype in (torch.float32, torch.bfloat16):
                own, given = weight.to(dtype), x.to(dtype)
                call = partial(F.linear, given, own)
                with torch.no_grad():
                    _cpu_seconds(call, 3), _cpu_seconds(kernel, 3)
                    turns = [
                        (_cpu_seconds(call, repeats), _cpu_seconds(kernel, repeats))
                        for _ in range(TURNS)
                    ]
                row = {
                    "size": size,
                    "bits": bits,
                    "dtype": str(dtype).removeprefix("torch."),
                    "call_us": 1e6 * statistics.median(ours for ours, _ in turns),
                    "kernel_us": 1e6 * statistics.median(theirs for _, theirs in turns),
                    "ratio": statistics.median(ours / theirs for ours, theirs in turns),
                }
                rows.append(row)
                print(
                    f"  {size} x {size}, {bits} bits, {row['dtype']:8} {row['call_us']:8.0f} "
                    f"{row['kernel_us']:8.0f} {row['ratio']:.2f}"
                )
    return rows


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024


def _peak(codec: str, tokens: int, answers: Any) -> None:
    """In a process of its own: the most memory that a forward pass over 24 layers takes."""
    torch.set_num_threads(2)
    size, depth = 2048, 24
    x = torch.randn(tokens, size)
    with torch.no_grad():
        # One weight, encoded once, copied: what the layers hold is their own.
        layer = _encoded(size, size, codec)
        layer(x)  # libraries, threads and their buffers
        model = nn.Sequential(layer, *[nn.Linear(1, 1, bias=False) for _ in range(depth - 1)])
        for other in list(model)[1:]:
            other.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        model(x)
        peak = _status("VmHWM") - before
    coded: list[Any] = [module.weight for module in model]
    stored = sum(weight.stored_bytes for weight in coded)
    answers.put({"peak": peak, "stored": stored, "decoded": size * size * 4})


def _memory() -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    rows = []
    print("forward over 24 layers of 2048 x 2048, float32, MB: peak above what the model holds")
    for codec in ("ectcq", "h264", "vvc"):
        for tokens in (1, 64):
            answers = context.Queue()
            process = context.Process(target=_peak, args=(codec, tokens, answers))
            process.start()
            row = {"codec": codec, "tokens": tokens, **answers.get(timeout=600)}
            process.join()
            row["activations"] = 2 * tokens * 2048 * 4
            row["allowed"] = 1.2 * row["decoded"] + row["activations"]
            rows.append(row)
            print(
                f"  {codec:8} {tokens:3} tokens: {row['peak'] / 1e6:6.1f} of "
                f"{row['allowed'] / 1e6:6.1f} allowed; the model holds {row['stored'] / 1e6:6.1f}"
            )
    return rows


def _prefetch() -> dict[str, Any]:
    """A forward pass with prefetch over one without, where decoding takes as long as multiplying.

    Without: a budget of one decoded weight, which is too little to decode ahead.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size, depth = 1024, 12
    model = nn.Sequential(*[_encoded(size, size) for _ in range(depth)])
    weight: Any = model[0].weight
    dense = weight.dequantize()
    decoding = min(_seconds(weight.dequantize, 5) for _ in range(9))

    def multiplying(x: torch.Tensor) -> float:
        return min(_seconds(lambda: F.linear(x, dense), 3) for _ in range(5))

    x = torch.randn(16, size)
    while multiplying(x) < decoding:
        x = torch.randn(len(x) + 16, size)
    tokens = len(x)
    budgets = {"without": 1, "with": 3}  # weights
    times: dict[str, list[float]] = {name: [] for name in budgets}
    results = {}
    with torch.no_grad():
        for _ in range(TURNS):
            for name, capacity in budgets.items():
                with decoded_cache(capacity * dense.nbytes):
                    for _ in range(2):
                        results[name] = model(x)
                    times[name].append(_seconds(lambda: model(x), 2))
    ratios = sorted(a / b for a, b in zip(times["with"], times["without"], strict=True))
    identical = torch.equal(results["with"], results["without"])
    print(
        f"prefetch, 12 layers of 1024 x 1024, {tokens} tokens, one thread each: "
        f"{statistics.median(ratios):.2f} of the time ({ratios[0]:.2f} to {ratios[-1]:.2f}), "
        f"results identical: {identical}"
    )
    return {"tokens": tokens, "ratios": ratios, "identical": identical}


PARTS: dict[str, Callable[[], Any]] = {
    "overhead": _overhead,
    "calls": _calls,
    "memory": _memory,
    "prefetch": _prefetch,
}

if __name__ == "__main__":
    main()
