"""`calibrate`: one quantization step for the whole model, by what errors do to its output.

To second order an error E of a layer costs Σ_i G_i · (E · H · Eᵀ)[i, i] per token: H the second
moments of the layer's input, G_i the mean square of the gradient of log p(y) by output i, with y
drawn from the model's own prediction. That is the approximation of the Fisher information by
Kronecker factors (Martens and Grosse, arXiv 1503.05671). The step of weight (i, j) is then
θ / √(G_i · H_jj), with one θ for the model, which all bits of rows, columns and layers follow from.
"""

import reprlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torchao.quantization import FqnToConfig

from torchcodec_weights.calibration.allocation import allocate, demand_of
from torchcodec_weights.calibration.selection import selected_weights
from torchcodec_weights.calibration.statistics import (
    Statistics,
    check_arguments,
    collect_statistics,
)
from torchcodec_weights.codecs.base import Codec
from torchcodec_weights.codecs.records import EncoderSettings
from torchcodec_weights.config import CodecWeightOnlyConfig
from torchcodec_weights.encoder.rate import EXACT_WEIGHTS
from torchcodec_weights.matrix.importance import Importance
from torchcodec_weights.third_party import is_linear


def calibrate(
    model: nn.Module,
    config: CodecWeightOnlyConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    sample_inputs: Sequence[Any] | None = None,
    statistics: Statistics | None = None,
) -> FqnToConfig:
    """Bits and steps that follow the importance of layers, rows and columns.

    `config.bits` is the average over all selected weights, with everything counted. A layer gets
    between half of it, or two bits below it, and two above it. Matrices of fewer than 65,536
    weights, and layers that the inputs do not reach, get `config.bits`. Weights shared with modules
    that are not encoded (an embedding tied to `lm_head`) are left out, and so stay dense.

    A causal language model of transformers needs no data: it writes the text that it is calibrated
    with. Any other model needs `sample_inputs`. Time and memory are those of `collect_statistics`.

    Args:
        model: with dense weights; left as it was.
        config: `codec_weight_only(..., bits=...)`, copied for every layer.
        filter_fn: takes (module, name), says whether the module's weight is to be encoded; all
            Linear layers by default.
        sample_inputs: as in `collect_statistics`.
        statistics: of `collect_statistics` for this model, to use again; excludes `sample_inputs`.

    Returns:
        A configuration for our `quantize_`, torchao's and transformers' `TorchAoConfig`, with the
        exact names of modules as keys. Importance travels with it within the process; in JSON and
        in checkpoints it becomes a configuration of bits alone.

    Raises:
        ValueError: an argument is not what it should be; `config` has no `bits`, or has adaptive
            steps; no layer is selected, or one without a weight; a weight cannot be encoded;
            `statistics` are of another model; or there are no `sample_inputs` and the model does
            not write text.
    """
    check_arguments(model, filter_fn, sample_inputs)
    _check_arguments(config, statistics, sample_inputs)
    codec, bits, settings = resolved(config)
    selected = selected_weights(model, filter_fn or is_linear)
    if statistics is None:
        statistics = collect_statistics(model, filter_fn, sample_inputs=sample_inputs)
    statistics.check(selected)
    important: dict[nn.Parameter, Importance] = {}
    for name, weight in selected.items():
        importance = statistics[name]
        if importance is not None and weight.numel() >= EXACT_WEIGHTS:
            important.setdefault(weight, importance)
    rates: dict[nn.Parameter, float] = {}
    if important:
        demands = [demand_of(w, i, codec, settings) for w, i in important.items()]
        found = allocate(demands, codec.rate_curve(settings), bits)
        rates = dict(zip(important, found.tolist(), strict=True))
    return FqnToConfig(
        {
            name: config.with_importance(important[weight], rates[weight])
            if weight in important
            else config.with_importance(None, bits)
            for name, weight in selected.items()
        }
    )


def resolved(config: CodecWeightOnlyConfig) -> tuple[Codec, float, EncoderSettings]:
    """The codec, the average bits and the codec's settings of a configuration for `calibrate`.

    Raises:
        ValueError: it has no `bits`, or adaptive steps.
    """
    codec, target, settings = config.resolve()
    if target is None or target.kind != "bits":
        raise ValueError(f"config with {target}: allowed: codec_weight_only(..., bits=...)")
    if settings.adaptive_steps:
        raise ValueError("config with tile_steps='adaptive': allowed: 'uniform', as steps differ")
    assert isinstance(codec, Codec)
    return codec, target.value, settings


def _check_arguments(config: Any, statistics: Any, sample_inputs: Any) -> None:
    for name, value, right, allowed in (
        (
            "config",
            config,
            isinstance(config, CodecWeightOnlyConfig),
            "codec_weight_only(..., bits=...)",
        ),
        (
            "statistics",
            statistics,
            statistics is None or isinstance(statistics, Statistics),
            "the result of collect_statistics, or None",
        ),
    ):
        if not right:
            raise ValueError(f"{name}={reprlib.repr(value)}: allowed: {allowed}")
    if statistics is not None and sample_inputs is not None:
        raise ValueError("statistics and sample_inputs: allowed: one of them")
