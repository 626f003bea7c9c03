"""Perplexity of SmolLM2-135M by methods that know the inputs of layers, at their true bits.

    export GGML_LIBRARY=…/libggml-base.so  # for gguf, see baselines.py
    python benchmarks/calibrated_peers.py --json benchmarks/results/calibrated_peers.json

All methods take the same statistics: of each layer's input, H = E[x xᵀ] of the dense model. By
default the model writes the text for them itself; `--text FILE` takes 16 sequences of 512 tokens of
a file, beyond its first 60,000 tokens, and `--statistics FILE` what `Statistics.save` wrote. All
Linear weights but `lm_head` are quantized. Perplexity is measured in float32. Rows that the JSON
file holds already are not measured again; statistics count as the same if their file's name is.

- `gptq/GROUP:BITS`: GPTQ (Frantar et al., arXiv 2210.17323). Columns are taken by decreasing H_jj
  (act-order), 128 at a time; 1 % of the mean H_jj is added to the diagonal. Groups are of columns
  as they stand (the authors' `static_groups`), so that no order is stored. Each group's range is
  shrunk to the least error of its weights, squares weighted by H_jj. So the expected divergence
  Σ_i G_i (E H Eᵀ)_ii / 2 of blocks 1, 10, 20 and 29 of SmolLM2 at 2 bits in groups of 96 is 0.277
  nats; it is 0.367 with the authors' `mse` (a power of 2.4, all weights alike), 0.397 with the
  whole range.
- `awq/GROUP:BITS`: AWQ (Lin et al., arXiv 2306.00978): columns are scaled by H_jj^(a/2) before they
  are rounded, a of 20 values by the least error tr(E H Eᵀ) of the layers that take the same input;
  then each group's range is cut down to half at most, by the least error again, except in the
  projections of queries and keys. Scales are folded into the layer before, whose own roundings are
  left out, and not stored. For `o_proj` they cannot be, as grouped heads share values: there they
  are stored.
- `rtn/GROUP:BITS`, `hqq/GROUP:BITS`, `gguf/TYPE`, `gguf-flat/TYPE`, `gguf-turned/TYPE`: those of
  baselines.py; `gguf` takes H_jj as its importance matrix, the others take nothing.
- `ours/PRESET:BITS`: `calibrate` with `ectcq`, which also knows the gradients of layers' outputs.

In `gptq` and `awq` a group of GROUP weights along a row has 2^BITS uniform levels, a scale in
bfloat16 and a zero point of BITS bits; both are counted, nothing is packed.

SmolLM2's weights were quantized before, to 16 levels in blocks of 32 along rows. Methods with
uniform levels in blocks along rows find some of that grid again at 4 bits; `gguf-turned` cannot.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from baselines import quantize
from common import parser
from torch import Tensor, nn
from tqdm.auto import tqdm

from torchcodec_weights import calibrate, codec_weight_only
from torchcodec_weights.calibration.statistics import Statistics, collect_statistics
from torchcodec_weights.calibration.text import LENGTH, SEQUENCES
from torchcodec_weights.evaluation.metrics import measure
from torchcodec_weights.evaluation.models import encoded_weights, load_smollm2
from torchcodec_weights.evaluation.recoding import recode
from torchcodec_weights.evaluation.rows import Row, Rows

_GGUF = "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K"
DEFAULT = [
    "dense",
    *(f"{name}/{group}:2" for name in ("gptq", "awq") for group in (192, 96, 64, 32)),
    *(
        f"{name}/{group}:{bits}"
        for name in ("gptq", "awq")
        for bits in (3, 4)
        for group in (192, 96)
    ),
    *(
        f"{name}/{variant}"
        for name in ("hqq", "rtn")
        for variant in ("96:2", "32:2", "96:3", "96:4")
    ),
    *(f"gguf-flat/{kind}" for kind in _GGUF),
    *(f"gguf-turned/{kind}" for kind in ("IQ4_XS", "Q4_K")),
    *(f"ours/best:{bits}" for bits in (2, 2.5, 3, 4)),
]
SKIPPED = 60_000
"""Tokens of `--text` that are left for evaluation."""
TOKENS = 4092

_BLOCK = 128
_DAMPING = 0.01
_SHRINKS = 20
_LEAST_SHRINK = 0.2
_EXPONENTS = 20
_CUTS = 10
_SHARING_INPUT = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_NOT_FOLDED = "self_attn.o_proj"
_NOT_CUT = "self_attn.q_proj", "self_attn.k_proj"


@dataclass(frozen=True)
class Layers:
    """What is to be quantized.

    Attributes:
        model: dense.
        weights: float32 (rows, cols), by the names of their modules.
        statistics: of the model; moments of all these layers.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    statistics: Statistics

    def moments(self, name: str) -> Tensor:
        """Float32 (cols, cols), a copy."""
        importance = self.statistics[name]
        assert importance is not None
        return torch.tensor(importance.moments)


@dataclass(frozen=True)
class Coded:
    """Quantized weights.

    Attributes:
        bits: all bits that would be stored.
        weights: decoded, float32, by the names of their modules.
    """

    bits: float
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Grid:
    """Uniform levels of a matrix (rows, cols) in groups along its rows.

    Attributes:
        scale: float32 (rows, groups), with the values of bfloat16.
        zero: float32 (rows, groups), integers that levels have.
        bits: of a level.
    """

    scale: Tensor
    zero: Tensor
    bits: int

    @classmethod
    def of(cls, groups: Tensor, bits: int) -> "Grid":
        """From the extremes of float32 groups (rows, groups, weights); zero is always a level.

        Raises:
            ValueError: `bits` is not 1 to 8.
        """
        if not 1 <= bits <= 8:
            raise ValueError(f"bits={bits}: allowed: 1 to 8")
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).clamp(min=1e-12).bfloat16().float()
        return cls(scale, (-low / scale).round().clamp(0, 2**bits - 1), bits)

    @classmethod
    def shrunk(cls, groups: Tensor, importance: Tensor, bits: int) -> "Grid":
        """As `of`, from extremes that are shrunk to the least squared error of each group.

        Importance is the weight of an error's square, float32 (groups, weights).
        """
        least, best = torch.full(groups.shape[:2], float("inf")), cls.of(groups, bits)
        for step in range(_SHRINKS):
            grid = cls.of(groups * (1 - step / _SHRINKS * (1 - _LEAST_SHRINK)), bits)
            error = grid.rounded(groups).sub_(groups)
            cost = error.square_().mul_(importance).sum(2)
            better, least = cost < least, torch.minimum(cost, least)
            best = cls(
                torch.where(better, grid.scale, best.scale),
                torch.where(better, grid.zero, best.zero),
                bits,
            )
        return best

    def rounded(self, values: Tensor, group: int | slice = slice(None)) -> Tensor:
        """The nearest levels' values, of one group (rows,) or of all (rows, groups, weights)."""
        scale, zero = self.scale[:, group], self.zero[:, group]
        if isinstance(group, slice):
            scale, zero = scale[..., None], zero[..., None]
        levels = (values / scale + zero).round_().clamp_(0, 2**self.bits - 1)
        return levels.sub_(zero).mul_(scale)

    def stored_bits(self, weights: int) -> int:
        """Of levels, scales and zero points."""
        return weights * self.bits + self.scale.numel() * (16 + self.bits)


def _in_groups(weight: Tensor, group: int) -> Tensor:
    rows, cols = weight.shape
    if group < 1 or cols % group:
        raise ValueError(f"group={group} with rows of {cols} weights: allowed: divisors of {cols}")
    return weight.reshape(rows, -1, group)


def gptq(weight: Tensor, moments: Tensor, bits: int, group: int) -> tuple[Tensor, int]:
    """Quantize columns one by one, and take the error of each out of the later ones.

    Frantar et al., arXiv 2210.17323, algorithm 1, with the act-order and the static groups of the
    authors' program, and ranges that are searched for.

    Args:
        weight: float32 (rows, cols), cols a multiple of `group`.
        moments: float32 (cols, cols), H.
        bits: of a level.
        group: weights.

    Returns:
        The decoded weight, and the bits that would be stored.

    Raises:
        ValueError: `bits` is not 1 to 8, or `group` does not divide cols.
        torch.linalg.LinAlgError: H is not positive definite, damped as it is.
    """
    rows, cols = weight.shape
    groups, energies = _in_groups(weight, group), moments.diagonal()
    grid = Grid.shrunk(groups, energies.reshape(-1, group), bits)
    order = energies.argsort(descending=True)
    damped = moments[order][:, order]
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    # Columns lie one after another in memory.
    left = weight.T[order].contiguous()
    for start in range(0, cols, _BLOCK):
        end = min(start + _BLOCK, cols)
        errors = torch.empty(end - start, rows)
        for j in range(start, end):
            level = grid.rounded(left[j], int(order[j]) // group)
            error = torch.sub(left[j], level, out=errors[j - start]).div_(factor[j, j])
            left[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
            left[j] = level
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    decoded = torch.empty(cols, rows)
    decoded[order] = left
    return decoded.T.contiguous(), grid.stored_bits(weight.numel())


def awq(
    weights: Mapping[str, Tensor], moments: Tensor, bits: int, group: int
) -> tuple[dict[str, Tensor], int]:
    """Quantize layers that take the same input with the columns scaled by powers of the input.

    Lin et al., arXiv 2306.00978, section 3.2, and the search of the authors' program, for both the
    scales and the groups' ranges. Where they measure the error of a block's output on samples, this
    is the expected error of the layers' outputs, which needs no more than H.

    Args:
        weights: by the names of their modules, float32 (rows, cols), cols a multiple of `group`.
        moments: float32 (cols, cols), H.
        bits: of a level.
        group: weights.

    Returns:
        The decoded weights, and the bits that would be stored.

    Raises:
        ValueError: `bits` is not 1 to 8, or `group` does not divide cols.
    """
    rms = moments.diagonal().sqrt().clamp(min=1e-4)
    least, best = float("inf"), torch.ones_like(rms)
    for step in range(_EXPONENTS):
        scales = rms ** (step / _EXPONENTS)
        scales = (scales / (scales.max() * scales.min()).sqrt()).bfloat16().float()
        error = 0.0
        for weight in weights.values():
            groups = _in_groups(weight * scales, group)
            rounded = Grid.of(groups, bits).rounded(groups).reshape(weight.shape) / scales
            error += _output_error(rounded - weight, moments)
        if error < least:
            least, best = error, scales
    scaled_moments = moments / (best * best[:, None])
    decoded, stored = {}, 0
    for name, weight in weights.items():
        groups = _in_groups(weight * best, group)
        kept = groups if name.endswith(_NOT_CUT) else _cut(groups, scaled_moments, bits)
        grid = Grid.of(kept, bits)
        decoded[name] = grid.rounded(kept).reshape(weight.shape) / best
        stored += grid.stored_bits(weight.numel())
        stored += 16 * weight.shape[1] * name.endswith(_NOT_FOLDED)
    return decoded, stored


def _output_error(error: Tensor, moments: Tensor) -> float:
    return float((error @ moments).mul_(error).sum())


def _cut(groups: Tensor, moments: Tensor, bits: int) -> Tensor:
    """Cut each group (rows, groups, weights) to the range of least error within the group."""
    count, width = groups.shape[1:]
    blocks = moments.reshape(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    extremes = groups.abs().amax(2, keepdim=True)
    least = torch.full(extremes.shape, float("inf"))
    best = torch.empty_like(extremes)
    for step in range(_CUTS):
        limit = extremes * (1 - step / (2 * _CUTS))
        kept = groups.clamp(-limit, limit)
        error = Grid.of(kept, bits).rounded(kept).sub_(groups).transpose(0, 1)
        cost = (error @ blocks).mul_(error).sum(2).T[..., None]
        better = cost < least
        least, best = torch.where(better, cost, least), torch.where(better, limit, best)
    return groups.clamp(-best, best)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("methods", nargs="*", default=DEFAULT, help="dense, or one of the above")
    source = options.add_mutually_exclusive_group()
    source.add_argument("--statistics", type=Path, metavar="FILE", help="of Statistics.save")
    source.add_argument("--text", type=Path, metavar="FILE", help="a text to calibrate with")
    options.add_argument("--tokens", type=int, default=TOKENS, help="of WikiText-2 to evaluate on")
    args = options.parse_args()
    coders = {method: _coder(method) for method in args.methods}
    rows = Rows(args.json)
    model, tokenizer = load_smollm2()
    dense = {
        name.removesuffix(".weight"): weight.data.clone()
        for name, weight in encoded_weights(model).items()
    }
    source_name = getattr(args.statistics or args.text, "name", "the model's own text")
    layers = None
    print(f"{'method':20} {'bits/weight':>11} {'perplexity':>11}")
    for method, coder in tqdm(coders.items(), desc="methods"):
        key = {"method": method, "statistics": source_name, "tokens": args.tokens}
        row = rows.find(key)
        if row is None:
            if layers is None:
                statistics = _statistics(model, tokenizer, args.statistics, args.text, dense)
                layers = Layers(model, dense, statistics)
            row = key | _measure(coder, layers, tokenizer, args.tokens)
            rows.add(row)
        tqdm.write(f"{method:20} {row['bits_per_weight']:11.4f} {row['perplexity']:11.2f}")


_Coder = Callable[[Layers], Coded]


def _measure(coder: _Coder, layers: Layers, tokenizer: Any, tokens: int) -> Row:
    start = time.perf_counter()
    coded = coder(layers)
    seconds = time.perf_counter() - start
    _put(layers.model, coded.weights)
    perplexity = measure("perplexity", layers.model, tokenizer, tokens=tokens)
    _put(layers.model, layers.weights)
    return {
        "bits_per_weight": coded.bits / sum(weight.numel() for weight in layers.weights.values()),
        "perplexity": perplexity,
        "encode_seconds": seconds,
    }


def _put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        model.get_parameter(f"{name}.weight").data.copy_(weight)


def _coder(method: str) -> _Coder:
    """The function behind a method's name.

    Raises:
        ValueError: there is no such method.
    """
    name, _, bits = method.partition(":")
    name, _, variant = name.partition("/")
    grouped: dict[str, Callable[..., Coded]] = {
        "gptq": _gptq,
        "awq": _awq,
        "rtn": partial(_baseline, "rtn"),
        "hqq": partial(_baseline, "hqq"),
    }
    if method == "dense":
        return lambda layers: Coded(16.0 * sum(w.numel() for w in layers.weights.values()), {})
    if name in ("gguf", "gguf-flat", "gguf-turned") and variant and not bits:
        return partial(_gguf, name, variant)
    if name == "ours" and variant and bits.replace(".", "", 1).isdecimal():
        return partial(_ours, variant, float(bits))
    if name in grouped and bits.isdecimal() and variant.isdecimal():
        return partial(grouped[name], int(variant), int(bits))
    raise ValueError(
        f"method {method!r}: allowed: dense, {'/GROUP:BITS, '.join(grouped)}/GROUP:BITS, "
        "gguf/TYPE, gguf-flat/TYPE, gguf-turned/TYPE, ours/PRESET:BITS"
    )


def _statistics(
    model: Any, tokenizer: Any, path: Path | None, text: Path | None, dense: Mapping[str, Tensor]
) -> Statistics:
    if path is not None:
        statistics = Statistics.load(path)
    else:
        inputs = None if text is None else _sequences(text, tokenizer)
        statistics = collect_statistics(
            model, lambda module, name: name in dense, sample_inputs=inputs
        )
    statistics.check(dense)
    for name in dense:
        importance = statistics[name]
        if importance is None or importance.moments.ndim != 2:
            raise ValueError(
                f"statistics without E[x xᵀ] of {name!r}: allowed: those of inputs that reach all "
                "Linear layers"
            )
    return statistics


def _sequences(text: Path, tokenizer: Any) -> list[Tensor]:
    """Int64 (1, 512) each, the first token BOS."""
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)
    tokens = torch.tensor(ids.input_ids)
    end = SKIPPED + SEQUENCES * (LENGTH - 1)
    if len(tokens) < end:
        raise ValueError(f"--text={text.name!r} has {len(tokens)} tokens: allowed: {end} or more")
    start = torch.full((SEQUENCES, 1), tokenizer.bos_token_id)
    return list(torch.cat([start, tokens[SKIPPED:end].reshape(SEQUENCES, -1)], 1).split(1))


def _gptq(group: int, bits: int, layers: Layers) -> Coded:
    stored, decoded = 0, {}
    for name, weight in tqdm(layers.weights.items(), desc="gptq", leave=False):
        decoded[name], found = gptq(weight, layers.moments(name), bits, group)
        stored += found
    return Coded(stored, decoded)


def _awq(group: int, bits: int, layers: Layers) -> Coded:
    blocks = dict.fromkeys(name.rsplit(".", 2)[0] for name in layers.weights)
    stored, decoded = 0, dict[str, Tensor]()
    for block in tqdm(blocks, desc="awq", leave=False):
        for members in _SHARING_INPUT:
            names = [f"{block}.{member}" for member in members]
            weights = {name: layers.weights[name] for name in names}
            coded, found = awq(weights, layers.moments(names[0]), bits, group)
            stored += found
            decoded |= coded
    return Coded(stored, decoded)


def _baseline(method: str, group: int, bits: int, layers: Layers) -> Coded:
    stored, decoded = 0.0, {}
    for name, weight in tqdm(layers.weights.items(), desc=method, leave=False):
        coded = quantize(weight, method, bits, str(group))
        stored, decoded[name] = stored + coded.bits, coded.weight
    return Coded(stored, decoded)


def _gguf(method: str, kind: str, layers: Layers) -> Coded:
    stored, decoded = 0.0, {}
    for name, weight in tqdm(layers.weights.items(), desc=method, leave=False):
        coded = quantize(weight, method, 0, kind, layers.moments(name).diagonal())
        stored, decoded[name] = stored + coded.bits, coded.weight
    return Coded(stored, decoded)


def _ours(preset: str, bits: float, layers: Layers) -> Coded:
    config = codec_weight_only("ectcq", bits=bits, preset=preset)
    configs = calibrate(
        layers.model, config, lambda _, name: name in layers.weights, statistics=layers.statistics
    )
    rate, decoded = recode(layers.weights, configs.fqn_to_config)
    return Coded(rate * sum(weight.numel() for weight in layers.weights.values()), decoded)


if __name__ == "__main__":
    main()
