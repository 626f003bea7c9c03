"""A frozen CodecTensor under training: adapters on top, gradients through it."""

from pathlib import Path

import pytest
import torch
from conftest import snr_db
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig

from torchcodec_weights import CodecTensor, codec_weight_only, decompress_, quantize_

GROUP = "Training on top"
CONFIG = codec_weight_only(bits=5, preset="fast")


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        )
    )


class LoRA(nn.Module):
    """Adapter by hand."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.feature(GROUP, "LoRA by hand", "gradients equal those over the decoded weight")
@pytest.mark.parametrize("how", ["eager", "compiled", "checkpointed"])
def test_lora_by_hand(how: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LoRA(nn.Linear(128, 256)), nn.ReLU(), LoRA(nn.Linear(256, 128)))
    quantize_(model, CONFIG, lambda module, name: name.endswith("base"))
    frozen = {name: w.clone() for name, w in model.named_parameters() if "base.weight" in name}
    x = torch.randn(7, 128, requires_grad=True)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        x.grad = None
        if how == "checkpointed":
            loss = checkpoint(model, x, use_reentrant=False)
        else:
            loss = torch.compile(model, fullgraph=True)(x) if how == "compiled" else model(x)
        loss.square().mean().backward()
        named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {**named, "x": x.grad.clone()}

    ours = gradients()
    assert "0.up.weight" in ours
    assert not any(name.endswith("base.weight") for name in ours)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    optimizer.step()
    for name, weight in frozen.items():
        assert torch.equal(model.get_parameter(name), weight), "the base stays as it was"
    ours = gradients()
    decompress_(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("base.weight" not in name)
    theirs = gradients()
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.feature(GROUP, "peft: LoRA trained, saved, loaded", "merge: dense first, or say how")
def test_peft(tmp_path: Path) -> None:
    model = tiny_llama()
    quantize_(model, CONFIG, lambda module, name: name.endswith("_proj"))
    ids = torch.tensor([[1, 5, 9, 20, 33]])
    base = model(ids).logits.detach()
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(model, lora)
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = tuned(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    with torch.no_grad():
        trained = tuned(ids).logits
        with tuned.disable_adapter():
            assert torch.equal(tuned(ids).logits, base)
    tuned.save_pretrained(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 100_000, "adapters alone"

    fresh = tiny_llama()
    quantize_(fresh, CONFIG, lambda module, name: name.endswith("_proj"))
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trained)

    with pytest.raises(ValueError, match="required to re-quantize the base layer after merging"):
        loaded.merge_and_unload()
    dense = tiny_llama()
    quantize_(dense, CONFIG, lambda module, name: name.endswith("_proj"))
    decompress_(dense)
    merged = PeftModel.from_pretrained(dense, tmp_path).merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trained, rtol=1e-3, atol=1e-4)


@pytest.mark.feature(GROUP, "peft: merge of a model loaded with TorchAoConfig", "encodes again")
def test_peft_merge_encodes_again(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(CONFIG))
    ids = torch.tensor([[1, 5, 9, 20, 33]])
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(model, lora).eval()
    with torch.no_grad():
        expected = tuned(ids).logits
        merged = tuned.merge_and_unload()
        assert isinstance(merged.model.layers[0].self_attn.q_proj.weight, CodecTensor)
        assert snr_db(expected, merged(ids).logits) > 20


@pytest.mark.feature(GROUP, "activation checkpointing in transformers")
def test_gradient_checkpointing() -> None:
    model = tiny_llama()
    quantize_(model, CONFIG)
    ids = torch.tensor([[1, 5, 9, 20]])

    def gradient() -> Tensor:
        model.zero_grad()
        model.train()
        model(ids, labels=ids).loss.backward()
        grad = model.model.embed_tokens.weight.grad
        assert grad is not None
        return grad.clone()

    plain = gradient()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(), plain)


@pytest.mark.feature(GROUP, "`requires_grad` stays False", "what trains is what is added")
def test_stays_frozen() -> None:
    layer = nn.Linear(128, 128)
    quantize_(layer, CONFIG, lambda module, name: True)
    layer.requires_grad_(True)
    assert isinstance(layer.weight, CodecTensor)
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
