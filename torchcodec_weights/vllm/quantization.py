"""vLLM's classes of a quantization method, for checkpoints with CodecTensors.

This module imports vLLM; it is imported by `register` alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from torchcodec_weights.config import CodecWeightOnlyConfig
from torchcodec_weights.matrix.dtypes import FLOAT_DTYPES
from torchcodec_weights.vllm.shards import PARTS, WEIGHT, ShardedWeight

NAME = "torchcodec_weights"
F = nn.functional


class CodecConfig(QuantizationConfig):
    """Models whose weights are bitstreams, as the command `compress` writes them.

    Which weights are encoded is seen in the files, so it takes nothing from `config.json`.
    """

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(FLOAT_DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # what a GPU cannot decode, the CPU decodes for it

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CodecConfig":
        return cls()

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take models that name our configuration: for transformers their method is torchao."""
        ours = user_quant in (None, "torchao", NAME) and _names_our_config(hf_quant_cfg)
        return NAME if ours else None

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            return CodecLinearMethod(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return CodecEmbeddingMethod(prefix)
        return None


def _names_our_config(value: Any) -> bool:
    """Whether a value of JSON contains a CodecWeightOnlyConfig, at any depth."""
    if isinstance(value, dict):
        ours = value.get("_type") == CodecWeightOnlyConfig.__name__
        return ours or any(map(_names_our_config, value.values()))
    return isinstance(value, list) and any(map(_names_our_config, value))


class _CodecMethod:
    """What linear layers and embeddings have in common; `layer` is one of vLLM's."""

    padded = False

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register empty parameters that collect what the checkpoint has for this layer."""
        place: Callable[..., Any] = extra_weight_attrs["weight_loader"]
        rows, cols = sum(output_partition_sizes), input_size_per_partition
        sharded = ShardedWeight(self.prefix, rows, cols, params_dtype, place, padded=self.padded)
        layer.sharded_weight = sharded
        for name, part in _parameters().items():
            dtype = params_dtype if part == WEIGHT else torch.uint8
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = partial(_collect, sharded, part)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Join what was collected, and register it as `weight`, or `weight_0`, `weight_1`, …

        Raises:
            CodecError: parts are missing, or a bitstream is corrupt, or its codec is not available.
        """
        if hasattr(layer, "weight_names"):
            return
        device = layer.weight.device
        for name in _parameters():
            delattr(layer, name)
        pieces = layer.sharded_weight.finish(device)
        single = len(pieces) == 1
        layer.weight_names = [WEIGHT if single else f"{WEIGHT}_{i}" for i in range(len(pieces))]
        for name, piece in zip(layer.weight_names, pieces, strict=True):
            layer.register_parameter(name, nn.Parameter(piece.weight, requires_grad=False))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply by the pieces of the weight, one after the other.

        Args:
            layer: whose weights were loaded.
            x: (..., columns).
            bias: (rows,), or None.

        Returns:
            (..., rows); rows of padding are 0.
        """
        outputs, end = [], 0
        for name in layer.weight_names:
            weight = getattr(layer, name)
            first, end = end, end + weight.shape[0]
            outputs.append(F.linear(x, weight, None if bias is None else bias[first:end]))
        if padding := layer.sharded_weight.rows - end:
            outputs.append(x.new_zeros(*x.shape[:-1], padding))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


class CodecLinearMethod(_CodecMethod, LinearMethodBase):
    """Linear layers, those that join several weights of the checkpoint included."""


class CodecEmbeddingMethod(_CodecMethod, QuantizeMethodBase):
    """Input and output embeddings, of which vLLM pads the vocabulary."""

    padded = True

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Look rows up; only the tiles that hold them are decoded."""
        if not layer.weight_names:  # this process has rows of padding alone
            sharded = layer.sharded_weight
            return torch.zeros(
                *input_.shape, sharded.cols, dtype=sharded.dtype, device=input_.device
            )
        return F.embedding(input_, layer.weight)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Share the input embedding's weight, before and after it is loaded."""
        layer.sharded_weight = embed_tokens.sharded_weight
        return layer


def _parameters() -> dict[str, str]:
    """Names of the parameters that collect, to the parts of a weight that they collect."""
    return {WEIGHT: WEIGHT, **{f"_{WEIGHT}_{part}": part for part in PARTS}}


def _collect(
    sharded: ShardedWeight, part: str, parameter: Tensor, loaded_weight: Tensor, *shard: Any
) -> None:
    """vLLM's loader of a parameter."""
    sharded.add(part, loaded_weight, *shard)


def register_method() -> None:
    """Add the method to vLLM's table."""
    if NAME not in QUANTIZATION_METHODS:
        register_quantization_config(NAME)(CodecConfig)
