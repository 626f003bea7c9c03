"""transformers: load with a configuration, save, load again, generate."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from torch import nn
from torchao.quantization import FqnToConfig
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    TorchAoConfig,
)

from torchcodec_weights import CodecTensor, codec_weight_only, quantize_
from torchcodec_weights.evaluation.models import load_smollm2

GROUP = "transformers"
EMBEDDING = "model.embed_tokens.weight"
PROJECTION = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with tied embeddings, saved."""
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama(num_hidden_layers=3).save_pretrained(folder)
    return folder


def quantization(*, embeddings: bool) -> TorchAoConfig:
    linear = codec_weight_only("ectcq", bits=5, preset="fast")
    if not embeddings:
        return TorchAoConfig(linear)
    config = FqnToConfig({"model.embed_tokens": linear, "_default": linear})
    return TorchAoConfig(config, include_input_output_embeddings=True)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.mark.feature(
    GROUP,
    "`from_pretrained` with `TorchAoConfig`, `save_pretrained`, `from_pretrained`, sharded",
    "transformers 5; what it loaded encoded, it saves with `save_original_format=False`",
)
@pytest.mark.feature(
    GROUP,
    "tied embeddings encoded once, stay tied",
    "with FqnToConfig; `save_pretrained` stores them twice, the command `compress` once",
)
@pytest.mark.filterwarnings("ignore:Config Deprecation")
@pytest.mark.parametrize("shard", ["100KB", "1GB"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_load_save_load(dense: Path, tmp_path: Path, embeddings: bool, shard: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=quantization(embeddings=embeddings)
    )
    found = weights(model)
    assert isinstance(found[PROJECTION], CodecTensor)
    assert isinstance(found[EMBEDDING], CodecTensor) == embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.tensor([[1, 5, 7, 300]])
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "100KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    # Otherwise transformers would undo how it put the weights together, which it cannot do for any
    # of torchao's.
    again.save_pretrained(tmp_path / "again", max_shard_size=shard, save_original_format=False)
    for model in (again, AutoModelForCausalLM.from_pretrained(tmp_path / "again")):
        for name, weight in weights(model).items():
            assert isinstance(weight, CodecTensor) == isinstance(found[name], CodecTensor), name
        assert model.lm_head.weight is model.model.embed_tokens.weight
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)


@pytest.mark.feature(GROUP, "`generate` with a static cache, compiled")
def test_generate_with_a_static_cache_compiled(dense: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense).eval()
    quantize_(model, codec_weight_only("ectcq", bits=5, preset="fast"))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    ids = torch.tensor([[1, 5, 7, 300]])
    expected = model.generate(ids, **options)
    model.forward = torch.compile(model.forward, fullgraph=True)
    compiled = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(compiled, expected)


def test_smollm2_is_an_ordinary_dense_model() -> None:
    """From a GGUF file, which newer versions of transformers take for a quantized model."""
    model, tokenizer = load_smollm2(torch.bfloat16)
    assert type(model.lm_head) is nn.Linear
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert getattr(model.config, "quantization_config", None) is None
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        following = model.float()(tokens).logits[0, -1].argmax()
    assert tokenizer.decode(following).strip() == "Paris"
