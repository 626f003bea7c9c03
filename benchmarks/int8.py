"""What `resident(model, "int8")` costs in error and gains in speed.

    python benchmarks/int8.py --json benchmarks/results/int8.json

Errors: SNR that int8 levels take from weights at each of `--bits`, in dB, and bytes of a weight, of
the Linear weights of SmolLM2-135M and of Gaussian weights (1536, 576). Perplexity of SmolLM2 at
`--perplexity-bits` on the first `--tokens` of WikiText-2, with the weights of the bitstream and
with those of the levels.

Speed: billions of products a second on one thread by dtype and tokens, of PyTorch's dense product,
PyTorch's int8 product (`aten._weight_int8pack_mm`), the levels' own, and the levels decoded for
PyTorch's dense product. They take turns, and the fastest of each is reported, as its time is
disturbed least. Each call takes another weight, as many as no cache holds.
"""

import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import gaussian, machine, parser, seconds, write
from torch import Tensor, nn
from torchao.quantization import FqnToConfig
from tqdm.auto import tqdm

from torchcodec_weights import codec_weight_only, quantize_, resident
from torchcodec_weights.codecs.common.int8 import PADDING
from torchcodec_weights.decoders.int8 import Int8Weight
from torchcodec_weights.evaluation.metrics import measure
from torchcodec_weights.evaluation.models import encoded_weights, load_smollm2
from torchcodec_weights.format.tiling import Window

_SHAPES = ((1536, 576), (4096, 4096))
_WEIGHTS = 2**27  # of each kind in turns: more than caches hold


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--bits", type=float, nargs="*", default=[2, 3, 4])
    options.add_argument("--perplexity-bits", type=float, default=3)
    options.add_argument("--tokens", type=int, default=4092)
    options.add_argument("--turns", type=int, default=11)
    args = options.parse_args()
    results: dict[str, Any] = {
        "machine": machine(),
        "error": [row for bits in args.bits for row in _errors(bits)],
        "perplexity": _perplexity(args.perplexity_bits, args.tokens),
    }
    torch.set_num_threads(1)
    results["speed"] = [
        row
        for shape in _SHAPES
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for row in _speed(*shape, dtype, args.turns)
    ]
    write(args.json, results)


def _smollm2(bits: float) -> tuple[Any, Any]:
    model, tokenizer = load_smollm2()
    config = codec_weight_only(bits=bits, preset="fast")
    quantize_(model, FqnToConfig(dict.fromkeys(encoded_weights(model), config)))
    return model, tokenizer


def _errors(bits: float) -> list[dict[str, Any]]:
    layer = nn.Linear(576, 1536, bias=False)
    layer.weight = nn.Parameter(gaussian(1536, 576))
    quantize_(layer, codec_weight_only(bits=bits, preset="fast"))
    return [_error("SmolLM2", bits, _smollm2(bits)[0]), _error("Gaussian", bits, layer)]


def _error(name: str, bits: float, model: nn.Module) -> dict[str, Any]:
    report = resident(model, "int8")
    lost = [row.snr_db - row.used_snr_db for row in report.weights]
    row = {
        "weights": name,
        "bits": bits,
        "mean_lost_db": statistics.mean(lost),
        "most_lost_db": max(lost),
        "bytes_per_weight": report.resident_bytes
        / sum(weight.shape[0] * weight.shape[1] for weight in report.weights),
    }
    tqdm.write(str(row))
    return row


def _perplexity(bits: float, tokens: int) -> dict[str, Any]:
    model, tokenizer = _smollm2(bits)
    row: dict[str, Any] = {"bits": bits, "tokens": tokens}
    # Dense weights are the bitstream's, decoded once.
    for name, form in (("bitstream", "dense"), ("int8", "int8")):
        resident(model, form)
        row[name] = measure("perplexity", model, tokenizer, tokens=tokens)
    tqdm.write(str(row))
    return row


def _speed(rows: int, cols: int, dtype: torch.dtype, turns: int) -> list[dict[str, Any]]:
    count = max(1, _WEIGHTS // (rows * cols))
    dense = itertools.cycle([gaussian(rows, cols).to(dtype) for _ in range(max(1, count // 2))])
    levels = [_levels(rows, cols) for _ in range(count)]
    for weight in levels:
        weight.multiply_levels(gaussian(1, cols), None)  # prepares the next ones
    own, theirs = itertools.cycle(levels), itertools.cycle(levels)
    decoded = itertools.cycle(levels)
    scales = torch.ones(rows, dtype=dtype)
    calls: dict[str, Callable[[Tensor], Any]] = {
        "dense": lambda x: nn.functional.linear(x, next(dense)),
        "levels": lambda x: next(own).multiply_levels(x, None),
        "decoded": lambda x: next(decoded).multiply_decoded(x, None),
        "torch": lambda x: _torch_int8(x, next(theirs).levels, scales),
    }
    found = []
    for tokens in (1, 4, 16, 64, 128):
        x = gaussian(tokens, cols).to(dtype)
        # PyTorch's int8 product of other dtypes than bfloat16 takes seconds for many tokens.
        names = [
            name for name in calls if name != "torch" or dtype == torch.bfloat16 or tokens == 1
        ]
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(turns):
            for name, taken in times.items():
                taken += seconds(partial(calls[name], x), 1)[1]
        work = rows * cols * tokens / 1e9
        row = {
            "shape": [rows, cols],
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": tokens,
            **{name: work / min(taken) for name, taken in times.items()},
        }
        tqdm.write(str(row))
        found.append(row)
    return found


def _torch_int8(x: Tensor, levels: Tensor, scales: Tensor) -> Tensor:
    product: Tensor = torch.ops.aten._weight_int8pack_mm(x, levels, scales)
    return product


def _levels(rows: int, cols: int) -> Int8Weight:
    flat = torch.randint(-127, 128, (rows * cols + PADDING,), dtype=torch.int8)
    nothing = torch.zeros(rows + 1, dtype=torch.int32)
    return Int8Weight(
        Window(0, rows, 0, cols),
        flat[: rows * cols].view(rows, cols),
        torch.ones(rows),
        torch.ones(cols),
        None,
        nothing,
        nothing[:0],
        torch.zeros(0),
        0,
        40.0,
    )


if __name__ == "__main__":
    main()
