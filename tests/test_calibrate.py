"""`calibrate`: bits and steps by what errors do to the model's output."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchao.core.config import config_from_dict, config_to_dict
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaForCausalLM,
    TorchAoConfig,
)

from torchcodec_weights import (
    CodecTensor,
    Statistics,
    calibrate,
    codec_weight_only,
    collect_statistics,
    compression_report,
    quantize_,
)
from torchcodec_weights.calibration.allocation import Demand, allocate
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.encoder.spread import Spread

CONFIG = codec_weight_only("ectcq", bits=3, preset="fast")
CURVE = get_codec("ectcq").rate_curve(CONFIG.resolve()[2])


def average(model: nn.Module, bits: dict[str, float]) -> float:
    sizes = {name: model.get_submodule(name).weight.numel() for name in bits}
    return sum(bits[name] * sizes[name] for name in bits) / sum(sizes.values())


def bits_of(plan: object) -> dict[str, float]:
    return {name: config.bits for name, config in plan.fqn_to_config.items()}  # type: ignore[attr-defined]


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """A small Llama with tied embeddings."""
    return tiny_llama(hidden_size=256, intermediate_size=512).eval()


def gaussian(scale: float) -> Spread:
    z = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    return Spread(z * np.float32(scale))


@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=10),
    st.floats(0.5, 8),
    st.integers(0, 2**32 - 1),
)
def test_rates_have_the_average_and_their_bounds(
    octaves: list[float], bits: float, seed: int
) -> None:
    sizes = np.random.default_rng(seed).integers(2**16, 2**24, len(octaves))
    demands = [Demand(gaussian(2.0**x), 0.02, int(n)) for x, n in zip(octaves, sizes, strict=True)]
    rates = allocate(demands, CURVE, bits)
    assert bits - 1e-3 < np.average(rates, weights=sizes) <= bits + 1e-9
    assert rates.min() >= max(bits / 2, bits - 2) - 1e-9
    assert rates.max() <= bits + 2 + 1e-9


def test_twice_the_deviation_is_one_bit_more() -> None:
    sizes = 2**16, 2**18, 2**17
    scales = 1.0, 2.0, 1.0
    demands = [Demand(gaussian(x), 0.0, n) for x, n in zip(scales, sizes, strict=True)]
    rates = allocate(demands, CURVE, 3.0)
    assert rates[1] - rates[0] == pytest.approx(1, abs=0.02)
    assert rates[2] == pytest.approx(rates[0])


def test_a_causal_model_without_data(llama: LlamaForCausalLM) -> None:
    llama.train()
    before = {name: p.clone() for name, p in llama.named_parameters()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    plan = calibrate(llama, CONFIG)
    bits = bits_of(plan)
    assert torch.equal(torch.rand(1), expected), "random numbers of the caller were used"
    assert llama.training
    for name, parameter in llama.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None
    assert "lm_head" not in bits, "tied to the embedding"
    assert len(bits) == 14
    assert bits["model.layers.0.self_attn.k_proj"] == 3, "too small to plan for"
    assert average(llama, bits) == pytest.approx(3, abs=1e-3)
    assert max(bits.values()) - min(bits.values()) > 0.1
    assert bits == bits_of(calibrate(llama, CONFIG)), "not the same again"
    quantize_(llama, plan)
    assert 2.97 < compression_report(llama).bits_per_weight <= 3
    assert llama.model.layers[0].mlp.up_proj.weight.header.order == 1


@pytest.mark.parametrize("codec", ["ectcq", "h264"])
def test_the_output_suffers_less(codec: str, llama: LlamaForCausalLM) -> None:
    """At equal bits, on other inputs than those that the model was calibrated with."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Inputs of different scale and correlation, as layers of trained models have them.
        for parameter in llama.parameters():
            if parameter.dim() == 2:
                scales = torch.randn(parameter.shape[1], generator=generator).mul(0.7).exp()
                parameter.mul_(scales)
    config = codec_weight_only(codec, bits=2.5, preset="fast")
    inputs = torch.randint(300, (24, 64), generator=generator)
    dense = copy.deepcopy(llama)
    plain = copy.deepcopy(llama)
    quantize_(plain, config)
    quantize_(llama, calibrate(llama, config, sample_inputs=list(inputs[:16].split(1))))
    assert compression_report(llama).bits_per_weight <= 2.5

    def divergence(model: nn.Module) -> float:
        with torch.no_grad():
            wanted = torch.log_softmax(dense(inputs[16:]).logits, -1)
            found = torch.log_softmax(model(inputs[16:]).logits, -1)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    assert divergence(llama) < 0.8 * divergence(plain)


def test_statistics_are_used_again(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    statistics = collect_statistics(llama, sample_inputs=[torch.arange(64).view(1, -1)])
    statistics.save(tmp_path / "statistics.safetensors")
    again = Statistics.load(tmp_path / "statistics.safetensors")
    for codec in ("ectcq", "h264"):
        config = codec_weight_only(codec, bits=2.5, preset="fast")
        bits = bits_of(calibrate(llama, config, statistics=statistics))
        assert bits == bits_of(calibrate(llama, config, statistics=again))
    with pytest.raises(ValueError, match="allowed: statistics of this model"):
        calibrate(tiny_llama(hidden_size=128), CONFIG, statistics=again)


@pytest.mark.filterwarnings("ignore:Config Deprecation")
def test_transformers_takes_it(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    plan = calibrate(llama, CONFIG)
    llama.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(plan))
    rates = {row.name: row.bits_per_weight for row in compression_report(model).weights}
    wanted = bits_of(plan)
    assert set(rates) == {f"{name}.weight" for name in wanted}
    for name, bits in wanted.items():
        assert bits - 0.2 < rates[f"{name}.weight"] <= bits
    assert model.model.layers[0].mlp.up_proj.weight.header.order == 1, "importance was lost"
    model.save_pretrained(tmp_path / "coded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "coded")
    assert isinstance(again.model.layers[0].mlp.up_proj.weight, CodecTensor)
    x = torch.arange(20).view(1, -1)
    with torch.no_grad():
        assert torch.equal(model(x).logits, again(x).logits)


def test_importance_stays_in_the_process(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    config = calibrate(llama, CONFIG).fqn_to_config["model.layers.0.mlp.up_proj"]
    assert config.importance is not None
    assert copy.copy(config).importance is config.importance
    assert copy.deepcopy(config).importance is config.importance
    for again in (
        pickle.loads(pickle.dumps(config)),
        config_from_dict(json.loads(json.dumps(config_to_dict(config)))),
    ):
        assert again == config
        assert again.importance is None
    torch.save(config, tmp_path / "config.pt")
    assert (tmp_path / "config.pt").stat().st_size < 4096
    assert torch.load(tmp_path / "config.pt", weights_only=True) == config
    other = nn.Linear(100, 100).weight
    with pytest.raises(ValueError, match=r"importance of a matrix of 512x256.*of 100x100"):
        CodecTensor.from_hp(other, config)


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
    bits = bits_of(calibrate(Net(4.0), CONFIG, sample_inputs=[given_as]))
    assert bits["loud"] - bits["quiet"] == pytest.approx(2, abs=0.1)
    assert bits["unused"] == 3


def test_an_encoder_needs_inputs() -> None:
    config = BertConfig(
        vocab_size=100,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
    )
    model = BertModel(config).eval()
    with pytest.raises(ValueError, match="sample_inputs"):
        calibrate(model, CONFIG)
    inputs = list(torch.randint(100, (8, 16), generator=torch.Generator().manual_seed(0)).split(1))
    plan = calibrate(model, CONFIG, sample_inputs=inputs)
    assert len(bits_of(plan)) == 13
    assert average(model, bits_of(plan)) == pytest.approx(3, abs=1e-3)
    quantize_(model, plan)
    assert 2.97 < compression_report(model).bits_per_weight <= 3


def test_layers_of_other_kinds() -> None:
    """Embeddings and convolutions, by the gradient of their weights."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words = nn.Embedding(512, 256)
            self.filter = nn.Conv1d(256, 256, 3, padding=1)
            self.out = nn.Linear(256, 256)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.filter(self.words(tokens).transpose(1, 2)).transpose(1, 2)
            return self.out(torch.relu(x))

    model = Mixed()
    tokens = torch.randint(300, (4, 64), generator=torch.Generator().manual_seed(0))
    before = model(tokens)
    wanted = {"words", "filter", "out"}
    plan = calibrate(model, CONFIG, lambda m, name: name in wanted, sample_inputs=[tokens])
    assert set(bits_of(plan)) == wanted
    quantize_(model, plan)
    report = compression_report(model)
    assert {row.name for row in report.weights} == {f"{name}.weight" for name in wanted}
    assert 2.9 < report.bits_per_weight <= 3
    assert (model(tokens) - before).square().mean() < 0.1 * before.square().mean()


def test_a_shared_weight_has_one_rate() -> None:
    net = Net(1.0)
    net.quiet.weight = net.loud.weight
    plan = calibrate(net, CONFIG, sample_inputs=[torch.randn(8, 256)])
    assert bits_of(plan)["quiet"] == bits_of(plan)["loud"]


def test_filter_fn() -> None:
    x = torch.randn(8, 256)
    plan = calibrate(Net(1.0), CONFIG, lambda m, name: name == "loud", sample_inputs=[x])
    assert bits_of(plan) == {"loud": pytest.approx(3)}


def test_what_cannot_be_calibrated() -> None:
    net, x = Net(1.0), [torch.randn(8, 256)]
    with pytest.raises(ValueError, match=r"step.*allowed: codec_weight_only\(\.\.\., bits="):
        calibrate(net, codec_weight_only("ectcq", step=0.5), sample_inputs=x)
    adaptive = codec_weight_only("h264", bits=2, tile_steps="adaptive")
    with pytest.raises(ValueError, match="tile_steps='adaptive': allowed: 'uniform'"):
        calibrate(net, adaptive, sample_inputs=x)
    with pytest.raises(ValueError, match="sample_inputs"):
        calibrate(net, CONFIG)
    with pytest.raises(ValueError, match="statistics=3: allowed: the result of collect_statistics"):
        calibrate(net, CONFIG, statistics=3)
    statistics = collect_statistics(net, sample_inputs=x)
    with pytest.raises(ValueError, match="statistics and sample_inputs: allowed: one of them"):
        calibrate(net, CONFIG, sample_inputs=x, statistics=statistics)
    with torch.no_grad():
        net.loud.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"loud\.weight: weight holds NaN"):
        calibrate(net, CONFIG, sample_inputs=x)
