"""`plan_bits`: bits for each layer under one average, by how sensitive the model is to its error.

A layer's distortion is what its error does to the model's output. To second order it is the sum
over the layer's weights of error variance times curvature, where the curvature of the
Kullback–Leibler divergence is the diagonal of the Fisher information: the mean square of the
gradient of log p(y), y drawn from the model's own prediction. One backward pass gives it for all
layers. As the error's variance falls by 2^(−2R) with the rate R, the Lagrangian has a closed
solution: R is half the logarithm of the sensitivity per weight, plus what makes the average right
(reverse water-filling with weighted distortion; Cover and Thomas, Elements of Information Theory,
chapter 10; the Fisher information as weight: Kirkpatrick et al., arXiv 1612.00796).
"""

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchao.quantization import FqnToConfig

from torchcodec_weights.codecs.base import Codec
from torchcodec_weights.config import CodecWeightOnlyConfig
from torchcodec_weights.encoder.rate import EXACT_WEIGHTS
from torchcodec_weights.matrix.normalize import normalize
from torchcodec_weights.tensor import check_weight
from torchcodec_weights.third_party import is_linear

_CAUSAL = 16, 64
"""Sequences and tokens in each."""
_ENCODER = 32, 16
"""Sentences are short, and what layers do to long rows of random tokens is something else."""
_TRUST = 0.5
"""Power of the sensitivities that random tokens give: to follow all of them costs MiniLM 1.3 points
of Spearman's correlation at 1.5 bits, to follow them half way costs nothing (docs/results.md)."""
_SEED = 0
_MOST_ABOVE = 2.0
_MOST_BELOW = 2.0


def plan_bits(
    model: nn.Module,
    config: CodecWeightOnlyConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    sample_inputs: Sequence[Any] | None = None,
) -> FqnToConfig:
    """Different bits for each layer, `config.bits` on average over all their weights.

    The more the model's output suffers from a layer's error, the more bits it gets: between half
    of `config.bits`, or two below it, and two above it. Matrices of fewer than 65,536 weights, and
    layers that the inputs do not reach, get `config.bits`. Weights shared with modules that are
    not encoded (an embedding tied to `lm_head`) are left out, and so stay dense.

    No data are needed for the text models of transformers: causal language models are tried on
    text that they generate themselves, encoders on random tokens. For encoders no gain has
    been shown yet (docs/results.md). Time is that of generating 64 tokens and of 16 forward and
    backward passes over 64; memory that of one layer's gradient and of one sequence's activations
    more.

    Args:
        model: with dense weights; left as it was.
        config: `codec_weight_only(..., bits=...)`, copied for every layer with its own bits.
        filter_fn: takes (module, name), says whether the module's weight is to be encoded; all
            Linear layers by default.
        sample_inputs: inputs to try the model on instead, best those it is for, a dozen or more
            and a thousand tokens in all: tensors, tuples of positional or mappings of named
            arguments.

    Returns:
        What our `quantize_`, torchao's and transformers' `TorchAoConfig` take, with the exact names
        of modules as keys.

    Raises:
        ValueError: an argument is not what it should be; `config` has no `bits`; no layer is
            selected, or one without a weight; a weight cannot be encoded; or there are no
            `sample_inputs` and `model` is not a text model of transformers.
    """
    _check_arguments(model, config, filter_fn, sample_inputs)
    codec, target, _ = config.resolve()
    if target is None or target.kind != "bits":
        raise ValueError(f"config with {target}: allowed: codec_weight_only(..., bits=...)")
    assert isinstance(codec, Codec)
    selected = _selected(model, filter_fn or is_linear)
    weights = [w for w in dict.fromkeys(selected.values()) if w.numel() >= EXACT_WEIGHTS]
    with _ready(model, weights):
        inputs = _own_inputs(model) if sample_inputs is None else sample_inputs
        sensitivity = _sensitivity(model, inputs, weights, codec.outlier_threshold)
    bits = dict.fromkeys(selected.values(), target.value)
    reached = [weight for weight in weights if sensitivity[weight] > 0]
    if reached:
        sizes = np.array([weight.numel() for weight in reached])
        density = np.array([sensitivity[weight] for weight in reached]) / sizes
        if sample_inputs is None and not _generates(model):
            density **= _TRUST
        rates = allocate(density * sizes, sizes, target.value)
        bits.update(zip(reached, rates.tolist(), strict=True))
    return FqnToConfig(
        {name: replace(config, bits=bits[weight]) for name, weight in selected.items()}
    )


def _check_arguments(model: Any, config: Any, filter_fn: Any, sample_inputs: Any) -> None:
    for name, value, right, allowed in (
        ("model", model, isinstance(model, nn.Module), "a torch.nn.Module"),
        (
            "config",
            config,
            isinstance(config, CodecWeightOnlyConfig),
            "codec_weight_only(..., bits=...)",
        ),
        (
            "filter_fn",
            filter_fn,
            filter_fn is None or callable(filter_fn),
            "a function of (module, name), or None",
        ),
        (
            "sample_inputs",
            sample_inputs,
            sample_inputs is None or _is_list(sample_inputs),
            "a list of one input or more, or None",
        ),
    ):
        if not right:
            raise ValueError(f"{name}={reprlib.repr(value)}: allowed: {allowed}")


def _is_list(inputs: Any) -> bool:
    # A tensor or a mapping is one input, although it has a length.
    single = isinstance(inputs, str | Tensor | Mapping)
    return not single and hasattr(inputs, "__len__") and len(inputs) > 0


def allocate(
    sensitivity: NDArray[np.float64], sizes: NDArray[np.int64], bits: float
) -> NDArray[np.float64]:
    """Rates that minimize the sum of sensitivity · 2^(−2 · rate) at an average rate.

    Args:
        sensitivity: (layers,), distortion of each layer at rate zero, positive.
        sizes: (layers,), weights of each.
        bits: average over all weights.

    Returns:
        (layers,), bits per weight, at most two above the average, and at least half of it or two
        below it.
    """
    ideal = 0.5 * np.log2(sensitivity / sizes)
    lowest, highest = max(bits / 2, bits - _MOST_BELOW), bits + _MOST_ABOVE
    # The average grows with the water level, from the lowest to the highest rate in between these.
    low, high = lowest - ideal.max(), highest - ideal.min()
    for _ in range(100):
        level = (low + high) / 2
        rates = np.clip(ideal + level, lowest, highest)
        low, high = (low, level) if np.average(rates, weights=sizes) > bits else (level, high)
    return np.clip(ideal + low, lowest, highest)


def _selected(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool]
) -> dict[str, nn.Parameter]:
    """Weights to encode by the names of their modules, without what is shared with dense ones.

    Raises:
        ValueError: a weight cannot be encoded, or there is none.
    """
    chosen: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if not filter_fn(module, name):
            continue
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"{name or 'model'} is selected, a {type(module).__name__} without a parameter "
                "'weight': allowed: modules that have one"
            )
        chosen[name] = weight
    wanted = {f"{name}.weight".lstrip(".") for name in chosen}
    dense = {
        parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name not in wanted
    }
    chosen = {name: weight for name, weight in chosen.items() if weight not in dense}
    if not chosen:
        raise ValueError("no layer of the model is selected: there is nothing to plan")
    for name, weight in chosen.items():
        try:
            check_weight(weight)
        except ValueError as error:
            raise ValueError(f"{name}.weight: {error}") from None
    return chosen


@contextmanager
def _ready(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, gradients for `weights` alone, random numbers of our own; all undone."""
    kept = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p, _, _ in kept if p.device.type == "cuda"}
    try:
        model.eval()
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        with torch.random.fork_rng(sorted(devices)), torch.enable_grad():
            torch.manual_seed(_SEED)
            yield
    finally:
        for parameter, required, gradient in kept:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode


def _own_inputs(model: nn.Module) -> list[Any]:
    """Sequences of tokens that a text model of transformers makes itself, one at a time.

    Raises:
        ValueError: it is none, or takes more than tokens.
    """
    config: Any = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"sample_inputs=None with {type(model).__name__}: allowed for text models of "
            "transformers that take nothing but tokens; give a list of inputs"
        )
    causal: Any = model
    generates = _generates(model)
    count, length = _CAUSAL if generates else _ENCODER
    length = min(length, getattr(config, "max_position_embeddings", length))
    device = next(model.parameters()).device
    if not generates:
        return list(torch.randint(vocabulary, (count, length)).to(device).split(1))
    start = config.bos_token_id
    first = torch.randint(vocabulary, (count, 1)) if start is None else start
    prompt = torch.zeros(count, 1, dtype=torch.int64).copy_(torch.as_tensor(first))
    with torch.no_grad():
        tokens = causal.generate(
            prompt.to(device),
            attention_mask=torch.ones_like(prompt, device=device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=length - 1,
            max_new_tokens=length - 1,
            pad_token_id=0,
        )
    return list(tokens.split(1))


def _generates(model: nn.Module) -> bool:
    causal: Any = model
    return hasattr(model, "can_generate") and bool(causal.can_generate())


def _sensitivity(
    model: nn.Module,
    inputs: Sequence[Any],
    weights: Sequence[nn.Parameter],
    threshold: float | None,
) -> dict[nn.Parameter, float]:
    """Distortion of the output for an error of the size of the weight itself, for each weight.

    The error is white where the weight is normalized: its variance in a row and column is that
    of Z times the squares of their scales. The geometric mean over inputs is half as uncertain as
    the arithmetic one, which a single input may rule; times the share of inputs that reach a layer.
    """
    single: dict[nn.Parameter, list[float]] = {weight: [] for weight in weights}
    profiles: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
    for weight in weights:
        norm = normalize(weight.detach().float().cpu().numpy(), threshold)
        rows, cols = torch.from_numpy(norm.row_scale), torch.from_numpy(norm.col_scale)
        profiles[weight] = rows.square().to(weight.device), cols.square().to(weight.device)

    def accumulate(weight: Tensor) -> None:
        assert isinstance(weight, nn.Parameter)
        assert weight.grad is not None
        rows, cols = profiles[weight]
        single[weight].append(float(rows @ (weight.grad.float().square() @ cols)))
        weight.grad = None  # one layer's at a time

    hooks = [weight.register_post_accumulate_grad_hook(accumulate) for weight in weights]
    try:
        for example in inputs:
            score = _score(_call(model, example))
            if score.requires_grad:
                score.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return {weight: _mean(values, len(inputs)) for weight, values in single.items()}


def _mean(values: Sequence[float], count: int) -> float:
    positive = [value for value in values if value > 0]
    if not positive:
        return 0.0
    return float(np.exp(np.mean(np.log(positive)))) * len(positive) / count


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple | list) else model(example)


def _score(output: Any) -> Tensor:
    """A scalar whose squared gradient is, on average, the curvature of the output's distortion.

    For logits, which is what transformers calls them, the distortion is the divergence of what they
    predict. For anything else it is the squared error, whose curvature is the mean square of the
    gradient of a sum with random signs (Hutchinson, 1989). Tokens and labels add up within
    one backward pass: drawn independently, their scores are uncorrelated.
    """
    logits = getattr(output, "logits", None)
    if logits is not None and logits.shape[-1] > 1:
        chances = torch.log_softmax(logits.float(), dim=-1)
        labels = torch.distributions.Categorical(logits=chances.detach()).sample()
        return chances.gather(-1, labels.unsqueeze(-1)).sum()
    if isinstance(output, Mapping):
        output = tuple(output.values())
    first = output[0] if isinstance(output, tuple | list) else output
    signs = torch.randint_like(first, 2) * 2 - 1
    return (signs * first).float().sum()
