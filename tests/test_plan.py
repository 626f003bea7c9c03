"""`plan_bits`: bits for each layer under one average."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaForCausalLM,
    TorchAoConfig,
)

from torchcodec_weights import (
    CodecTensor,
    codec_weight_only,
    compression_report,
    plan_bits,
    quantize_,
)
from torchcodec_weights.models.plan import allocate

CONFIG = codec_weight_only("ectcq", bits=3, preset="fast")


def average(model: nn.Module, bits: dict[str, float]) -> float:
    sizes = {name: model.get_submodule(name).weight.numel() for name in bits}
    return sum(bits[name] * sizes[name] for name in bits) / sum(sizes.values())


def bits_of(plan: object) -> dict[str, float]:
    return {name: config.bits for name, config in plan.fqn_to_config.items()}  # type: ignore[attr-defined]


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """A small Llama with tied embeddings."""
    return tiny_llama(hidden_size=256, intermediate_size=512).eval()


@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=30),
    st.floats(0.5, 8),
    st.integers(0, 2**32 - 1),
)
def test_rates_have_the_average_and_their_bounds(
    octaves: list[float], bits: float, seed: int
) -> None:
    sizes = np.random.default_rng(seed).integers(2**16, 2**24, len(octaves))
    rates = allocate(np.exp2(octaves) * sizes, sizes, bits)
    assert bits - 1e-6 < np.average(rates, weights=sizes) <= bits + 1e-9
    assert rates.min() >= max(bits / 2, bits - 2) - 1e-9
    assert rates.max() <= bits + 2 + 1e-9


def test_four_times_the_sensitivity_is_one_bit_more() -> None:
    sizes = np.array([2**16, 2**18, 2**17])
    rates = allocate(np.array([1.0, 4.0, 1.0]) * sizes, sizes, 3.0)
    assert rates[1] - rates[0] == pytest.approx(1)
    assert rates[2] == pytest.approx(rates[0])


def test_a_causal_model_without_data(llama: LlamaForCausalLM) -> None:
    llama.train()
    llama.model.norm.weight.grad = torch.ones(256)
    before = {name: p.clone() for name, p in llama.named_parameters()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    bits = bits_of(plan_bits(llama, CONFIG))
    assert torch.equal(torch.rand(1), expected), "random numbers of the caller were used"
    assert llama.training
    assert llama.model.norm.weight.grad.sum() == 256
    for name, parameter in llama.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None or name == "model.norm.weight"
    assert "lm_head" not in bits, "tied to the embedding"
    assert len(bits) == 14
    assert bits["model.layers.0.self_attn.k_proj"] == 3, "too small to plan for"
    assert average(llama, bits) == pytest.approx(3, abs=1e-6)
    assert max(bits.values()) - min(bits.values()) > 0.1
    assert bits == bits_of(plan_bits(llama, CONFIG)), "not the same again"
    quantize_(llama, plan_bits(llama, CONFIG))
    assert 2.97 < compression_report(llama).bits_per_weight <= 3


@pytest.mark.filterwarnings("ignore:Config Deprecation")
def test_transformers_takes_the_plan(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    plan = plan_bits(llama, CONFIG)
    llama.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(plan))
    rates = {row.name: row.bits_per_weight for row in compression_report(model).weights}
    wanted = bits_of(plan)
    assert set(rates) == {f"{name}.weight" for name in wanted}
    for name, bits in wanted.items():
        assert bits - 0.2 < rates[f"{name}.weight"] <= bits
    model.save_pretrained(tmp_path / "coded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "coded")
    assert isinstance(again.model.layers[0].mlp.up_proj.weight, CodecTensor)


class Net(nn.Module):
    """Two layers, one louder than the other by `gain`, and one that is never used."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loud, self.quiet, self.unused = (nn.Linear(256, 256) for _ in range(3))
        self.gain = gain

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        x = x if mask is None else x * mask
        return self.gain * self.loud(x) + self.quiet(x)


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
def test_any_model_with_inputs(form: str) -> None:
    x = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
    given_as = {"tensor": x, "tuple": (x,), "mapping": {"x": x, "mask": torch.ones(256)}}[form]
    bits = bits_of(plan_bits(Net(4.0), CONFIG, sample_inputs=[given_as]))
    assert bits["loud"] - bits["quiet"] == pytest.approx(2, abs=0.05)
    assert bits["unused"] == 3


def test_an_encoder_gets_random_tokens() -> None:
    config = BertConfig(
        vocab_size=100,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
    )
    model = BertModel(config)
    bits = bits_of(plan_bits(model, CONFIG))
    assert bits["pooler.dense"] == 3
    assert len(bits) == 13
    assert average(model, bits) == pytest.approx(3, abs=1e-6)


def test_a_shared_weight_has_one_rate() -> None:
    net = Net(1.0)
    net.quiet.weight = net.loud.weight
    bits = bits_of(plan_bits(net, CONFIG, sample_inputs=[torch.randn(8, 256)]))
    assert bits["quiet"] == bits["loud"]


def test_filter_fn() -> None:
    x = torch.randn(8, 256)
    plan = plan_bits(Net(1.0), CONFIG, lambda m, name: name == "loud", sample_inputs=[x])
    assert bits_of(plan) == {"loud": pytest.approx(3)}


def test_what_cannot_be_planned() -> None:
    net = Net(1.0)
    with pytest.raises(ValueError, match=r"step.*allowed: codec_weight_only\(\.\.\., bits="):
        plan_bits(net, codec_weight_only("ectcq", step=0.5))
    with pytest.raises(ValueError, match="sample_inputs=None with Net: allowed for text models"):
        plan_bits(net, CONFIG)
    with pytest.raises(ValueError, match="no layer of the model is selected"):
        plan_bits(net, CONFIG, lambda module, name: False)
    with torch.no_grad():
        net.loud.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"loud\.weight: weight holds NaN"):
        plan_bits(net, CONFIG)
