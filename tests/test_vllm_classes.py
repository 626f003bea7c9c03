"""The plug-in in vLLM itself: layers, and a model that generates. Skipped where there is no vLLM.

It needs a build of vLLM for the CPU, which needs versions of other packages that the other tests do
not run with: docs/vllm.md has what it was run with.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from torchcodec_weights import CodecTensor, codec_weight_only
from torchcodec_weights.cli import main
from torchcodec_weights.models.checkpoint import flatten, load_folder

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

PROMPT = [1, 5, 9, 17, 200, 31]


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for `apply_model`
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }.items():
        monkeypatch.setitem(os.environ, name, value)


def tiny(*, tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,  # vLLM pads it to 320
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def shown(model: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {n: (type(p.data).__name__, tuple(p.shape)) for n, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.feature(
    "vLLM",
    "generates: eager, compiled, tensor parallelism over two processes",
    "passed by hand, as vLLM for the CPU needs other versions of packages; docs/vllm.md",
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("options", "exclude"),
    [
        ({}, []),
        ({"safetensors_load_strategy": "torchao"}, []),
        ({}, ["--exclude", "k_proj|layers.1.mlp"]),
        ({"tensor_parallel_size": 2}, []),
        ({"enforce_eager": False}, []),
        ({"enforce_eager": False, "tensor_parallel_size": 2}, []),
    ],
)
def test_generates_what_the_decoded_model_does(
    tmp_path: Path, tied: bool, options: dict[str, Any], exclude: list[str]
) -> None:
    """By log-probabilities, in float32, with weights that are not encoded among the others."""
    from vllm import LLM, SamplingParams

    model = tiny(tied=tied)
    model.save_pretrained(tmp_path / "dense")
    folder = tmp_path / "encoded"
    assert main(["compress", str(tmp_path / "dense"), str(folder), "--bits", "5", *exclude]) == 0
    defaults = {"enforce_eager": True, "tensor_parallel_size": 1}
    llm = LLM(
        str(folder),
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=2,
        dtype="float32",
        kv_cache_memory_bytes=2**24,
        **defaults | options,
    )
    assert llm.llm_engine.vllm_config.model_config.quantization == "torchcodec_weights"
    ranks = llm.apply_model(shown)
    assert len(ranks) == options.get("tensor_parallel_size", 1)
    attention = "model.layers.1.self_attn.qkv_proj.weight"
    for weights in ranks:
        kinds = [weights[f"{attention}_{i}"][0] for i in range(3)]
        assert kinds == ["CodecTensor", "Tensor" if exclude else "CodecTensor", "CodecTensor"]
        assert weights[f"{attention}_0"][1][0] == 128 // len(ranks)
        assert weights["lm_head.weight"][0] == "CodecTensor"
    assert sum(weights["lm_head.weight"][1][0] for weights in ranks) == 300

    sampling = SamplingParams(
        temperature=0, max_tokens=8, detokenize=False, logprobs=3, ignore_eos=True
    )
    [output] = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    stored = load_folder(folder)
    dense = {n: t.dequantize() if isinstance(t, CodecTensor) else t for n, t in stored.items()}
    assert not model.load_state_dict(dense, strict=False).unexpected_keys
    tokens = list(PROMPT)
    generated = output.outputs[0]
    assert len(generated.token_ids) == 8
    for token, found in zip(generated.token_ids, generated.logprobs, strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        assert token == int(wanted.argmax())
        for other, probability in found.items():
            assert abs(probability.logprob - float(wanted[other])) < 1e-5
        tokens.append(token)


def encoded(rows: int, cols: int) -> CodecTensor:
    return CodecTensor.from_hp(torch.randn(rows, cols), codec_weight_only(bits=4, preset="fast"))


def load(layer: Any, weights: dict[Any, CodecTensor]) -> None:
    """As vLLM's models do it; shard None for a weight that is not joined, or joined in the file."""
    parameters = dict(layer.named_parameters())
    for shard, weight in weights.items():
        for name, tensor in flatten("weight", weight)[0].items():
            arguments = () if shard is None else (shard,)
            parameters[name].weight_loader(parameters[name], tensor, *arguments)
    layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.slow
def test_each_rank_keeps_its_rows_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of four ranks, one after the other in one process: nothing is sent between them."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    from torchcodec_weights.vllm.quantization import CodecConfig

    torch.manual_seed(0)
    ranks, config = 4, CodecConfig()
    q, k, v = encoded(128, 64), encoded(64, 64), encoded(64, 64)
    both, down, embedding = encoded(256, 64), encoded(64, 128), encoded(300, 64)
    x, wide, tokens = torch.randn(3, 64), torch.randn(3, 128), torch.arange(60)
    for rank in range(ranks):
        for module in (linear, vocab_parallel_embedding):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)
        with set_current_vllm_config(VllmConfig()):
            qkv = linear.QKVParallelLinear(64, 32, 4, 2, bias=False, quant_config=config)
            gate_up = linear.MergedColumnParallelLinear(
                64, [128, 128], bias=True, quant_config=config
            )
            row = linear.RowParallelLinear(128, 64, bias=False, quant_config=config)
            head = vocab_parallel_embedding.ParallelLMHead(300, 64, quant_config=config)
        load(qkv, {"q": q, "k": k, "v": v})
        # Two ranks share a head of keys and values.
        heads = [w.dequantize().split(32) for w in (q, k, v)]
        wanted = torch.cat([heads[0][rank], heads[1][rank // 2], heads[2][rank // 2]])
        torch.testing.assert_close(qkv.quant_method.apply(qkv, x), x @ wanted.t())

        load(gate_up, {None: both})
        bias = torch.randn(64)
        wanted = torch.cat([half.chunk(ranks)[rank] for half in both.dequantize().chunk(2)])
        found = gate_up.quant_method.apply(gate_up, x, bias)
        torch.testing.assert_close(found, x @ wanted.t() + bias)

        load(row, {None: down})
        mine, wanted = (t.chunk(ranks, 1)[rank] for t in (wide, down.dequantize()))
        torch.testing.assert_close(row.quant_method.apply(row, mine), mine @ wanted.t())

        load(head, {None: embedding})
        wanted = embedding.dequantize()[80 * rank : 80 * rank + 80]
        logits = head.quant_method.apply(head, x)
        assert logits.shape == (3, 80)
        torch.testing.assert_close(logits[:, : len(wanted)], x @ wanted.t())
        assert torch.equal(head.quant_method.embedding(head, tokens), wanted[:60])
