"""`resident`: weights kept as int8 levels or dense beside their bitstreams."""

import copy
import gc
import io
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import snr_db, tiny_llama
from torch import Tensor, nn

from torchcodec_weights import (
    CodecError,
    CodecTensor,
    codec_weight_only,
    compression_report,
    decoded_cache,
    decompress_,
    quantize_,
    resident,
)
from torchcodec_weights.decoders.resident import KEPT
from torchcodec_weights.matrix.dtypes import FLOAT_DTYPES
from torchcodec_weights.matrix.opened import open_matrix

CONFIG = codec_weight_only(bits=4, preset="fast")
X = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """An embedding, two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 128)
        self.first = nn.Linear(128, 128)
        self.second = nn.Linear(128, 128)
        self.head = nn.Linear(128, 200, bias=False)

    def forward(self, indices: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(indices)
        hidden = hidden + self.second(torch.relu(self.first(hidden)))
        return self.head(hidden)


@pytest.fixture
def model() -> Mixed:
    torch.manual_seed(0)
    made = Mixed()
    quantize_(made, CONFIG, lambda module, name: bool(name))
    return made.requires_grad_(False)


INDICES = torch.tensor([[0, 7, 199], [3, 3, 5]])


def forms(model: nn.Module) -> dict[str, str]:
    return {row.name.split(".")[0]: row.resident for row in compression_report(model).weights}


def test_dense_is_what_decompressed_weights_give(model: Mixed) -> None:
    dense = copy.deepcopy(model)
    decompress_(dense)
    report = resident(model, "dense")
    assert torch.equal(model(INDICES), dense(INDICES))
    assert report.resident_bytes == report.dense_bytes
    assert all(row.resident_snr_db == float("inf") for row in report.weights)
    assert str(report).count("  dense     ectcq") == 4


def test_int8_loses_what_the_report_says(model: Mixed) -> None:
    bits = model(INDICES)
    report = resident(model, "int8")
    assert set(forms(model).values()) == {"int8"}
    assert 30 < snr_db(bits, model(INDICES)) < 60
    for row in report.weights:
        weight = model.get_parameter(row.name)
        used = F.linear(torch.eye(weight.shape[1]), weight).T
        assert snr_db(weight.dequantize(), used) == pytest.approx(row.resident_snr_db, abs=0.05)
        assert row.snr_db - 0.15 < row.used_snr_db < row.snr_db
        assert 1 < row.resident_bytes / weight.numel() < 1.1
    assert report.resident_bytes == sum(row.resident_bytes for row in report.weights)
    assert f"Resident beside them: {report.resident_bytes:,} bytes." in report.totals
    parsed = json.loads(report.to_json())
    assert parsed["resident_bytes"] == report.resident_bytes
    assert parsed["weights"][0]["resident"] == "int8"
    # A look-up takes the same weights as a product does.
    looked_up = F.embedding(torch.arange(200), model.embedding.weight)
    assert torch.allclose(F.linear(torch.eye(128), model.embedding.weight).T, looked_up, atol=1e-6)


def test_bits_undo_it(model: Mixed) -> None:
    bits = model(INDICES)
    for form in ("int8", "dense", "int8"):
        resident(model, form)
    report = resident(model, "bits")
    assert torch.equal(model(INDICES), bits)
    assert report.resident_bytes == 0
    assert "Resident" not in report.totals
    assert json.loads(resident(model, "bits").to_json())["weights"][0]["resident_snr_db"] is None


def test_a_budget_is_spent_layer_by_layer_the_embedding_last(model: Mixed) -> None:
    bytes_of = {row.name: row.resident_bytes for row in resident(model, "int8").weights}
    layer = bytes_of["first.weight"]
    order = ["first", "second", "head", "embedding"]
    for count in range(len(order) + 1):
        budget = sum(bytes_of[f"{name}.weight"] for name in order[:count])
        report = resident(model, budget=budget)
        assert report.resident_bytes == budget
        assert {name for name, form in forms(model).items() if form == "int8"} == {*order[:count]}
    # The head does not fit, but nothing smaller is left out for that.
    assert resident(model, budget=layer - 1).resident_bytes == 0
    assert resident(model, budget="1 GiB").resident_bytes == sum(bytes_of.values())
    assert resident(model, budget=0).resident_bytes == 0


def test_a_budget_keeps_dense_what_int8_would_harm() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 128))
    quantize_(layers[0], codec_weight_only("lossless"))
    quantize_(layers[1], codec_weight_only(bits=7, preset="fast"))
    quantize_(layers[2], codec_weight_only(bits=3, preset="fast"))
    found = [row.resident for row in resident(layers, budget="1MB").weights]
    assert found == ["dense", "dense", "int8"]
    # No room for a dense one: the lossless stays as it is.
    found = [row.resident for row in resident(layers, budget=20_000).weights]
    assert found == ["bits", "bits", "int8"]


def test_the_weights_are_the_same_for_all_else(model: Mixed, tmp_path: Any) -> None:
    weight = model.first.weight
    exact = weight.dequantize()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    size = buffer.tell()
    resident(model, "int8")
    assert isinstance(model.first.weight, CodecTensor)
    assert torch.equal(weight.dequantize(), exact)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert buffer.tell() == size
    assert forms(copy.deepcopy(model)) == dict.fromkeys(forms(model), "bits")
    decompress_(model)
    assert torch.equal(model.first.weight, exact)


@pytest.mark.parametrize("form", ["int8", "dense"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_all_that_multiplies(model: Mixed, form: str, dtype: torch.dtype) -> None:
    """Slices, transposed weights and other operators compute with what is resident."""
    model = model.to(dtype)
    resident(model, form)
    weight = model.head.weight
    x = X.to(dtype)
    used = F.embedding(torch.arange(200), weight)
    tight = {"rtol": 0.02, "atol": 0.02} if dtype != torch.float32 else {"rtol": 1e-4, "atol": 1e-5}
    for product, expected in (
        (F.linear(x, weight), F.linear(x, used)),
        (F.linear(x[0], weight, x[1].new_ones(200)), F.linear(x[0], used) + 1),
        (F.linear(x.repeat(40, 1), weight), F.linear(x.repeat(40, 1), used)),
        (F.linear(x[None, :0], weight), F.linear(x[None, :0], used)),
        (F.linear(x, weight[50:90]), F.linear(x, used[50:90])),
        (F.linear(x[:, 20:50].t().t(), weight[:, 20:50]), F.linear(x[:, 20:50], used[:, 20:50])),
        (x @ weight.t(), x @ used.t()),
        (used @ weight.t(), used @ used.t()),
        (used.t() @ weight, used.t() @ used),
    ):
        assert product.dtype == dtype
        torch.testing.assert_close(product, expected, **tight)
    rows = F.embedding(INDICES.int(), weight)
    assert torch.equal(rows, used[INDICES])
    with pytest.raises(IndexError):
        F.embedding(torch.tensor([200]), weight)


def test_experts_and_convolutions() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleDict({"conv": nn.Conv2d(32, 64, 3), "experts": nn.Module()})
    layers["experts"].weight = nn.Parameter(torch.randn(4, 64, 64))
    quantize_(layers, codec_weight_only("lossless"), lambda m, name: bool(name))
    image, x = torch.randn(2, 32, 8, 8), torch.randn(4, 5, 64)
    conv, experts = layers["conv"], layers["experts"].weight
    before = conv(image), torch.bmm(x, experts), F.linear(x[0], experts[2])
    resident(layers, "dense")
    for a, b in zip(
        before, (conv(image), torch.bmm(x, experts), F.linear(x[0], experts[2])), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(resident(layers, "int8").weights) == 2
    for a, b in zip(
        before, (conv(image), torch.bmm(x, experts), F.linear(x[0], experts[2])), strict=True
    ):
        assert not torch.equal(a, b)
        assert snr_db(a, b) > 35


def test_gradients_are_those_of_the_same_weight(model: Mixed) -> None:
    resident(model, "int8")
    used = F.embedding(torch.arange(128), model.first.weight)
    x = X.clone().requires_grad_()
    (ours,) = torch.autograd.grad(F.linear(x, model.first.weight).square().sum(), x)
    (expected,) = torch.autograd.grad(F.linear(x, used).square().sum(), x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_autocast(model: Mixed) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        bits = model.first(X)
        for form in ("int8", "dense"):
            resident(model, form)
            product = model.first(X)
            assert product.dtype == torch.bfloat16
            assert snr_db(bits, product) > 30


def test_other_dtypes_than_the_dense_weights_are_decoded(model: Mixed) -> None:
    layer = model.first.to(torch.bfloat16)
    resident(layer, "dense")
    layer.to(torch.float32)  # the same bitstream
    weight = layer.weight.dequantize()
    assert torch.equal(F.embedding(INDICES[0, :2], layer.weight), weight[INDICES[0, :2]])
    torch.testing.assert_close(F.linear(X, layer.weight), F.linear(X, weight))


def test_what_is_kept_goes_with_the_weight(model: Mixed) -> None:
    resident(model, "int8")
    serials = [
        open_matrix(*weight.coded).serial for weight in model.parameters() if weight.dim() == 2
    ]
    assert KEPT.keys() >= {*serials}
    other = CodecTensor.from_hp(torch.randn(128, 128), CONFIG)
    model.first.weight = nn.Parameter(other, requires_grad=False)
    gc.collect()
    assert len(KEPT.keys() & {*serials}) == 3
    assert forms(model)["first"] == "bits"
    del other
    for name in ("embedding", "second", "head"):
        delattr(model, name)
    gc.collect()
    assert not KEPT.keys() & {*serials}


def test_a_weight_that_is_written_to_is_decoded_again() -> None:
    layer, other = nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)
    config = codec_weight_only("lossless")
    with torch.no_grad():
        other.weight.copy_(-layer.weight)
    quantize_(layer, config)
    quantize_(other, config)
    layer(X)
    resident(layer, "int8")
    layer.weight.copy_(other.weight)
    assert forms(nn.ModuleDict({"m": layer})) == {"m": "bits"}
    assert torch.equal(layer(X), other(X))


def test_damage_is_told_with_the_weights_name(model: Mixed) -> None:
    model.second.weight.qdata[-10] ^= 255
    for form in ("int8", "dense"):
        with pytest.raises(CodecError, match=r"second\.weight: .*corrupt"):
            resident(model, form)
        assert forms(model)["first"] == form
        assert forms(model)["second"] == "bits"


def test_goes_before_the_decoded_cache(model: Mixed) -> None:
    resident(model, "int8")
    expected = model(INDICES)
    with decoded_cache("1MB"):
        assert torch.equal(model(INDICES), expected)


def test_weights_of_inference_mode() -> None:
    """PyTorch does not count writes to them, so their headers are read again at each use."""
    layer = nn.Module()
    with torch.inference_mode():
        layer.register_buffer("weight", CodecTensor.from_hp(torch.randn(128, 128), CONFIG))
        bits = F.linear(X, layer.weight)
        assert layer.weight.qdata.is_inference()
        assert resident(layer, "int8").weights[0].resident == "int8"
        assert 30 < snr_db(bits, F.linear(X, layer.weight)) < 60
    assert 30 < snr_db(bits, F.linear(X, layer.weight)) < 60


def test_a_shared_weight_is_kept_once() -> None:
    model = tiny_llama()
    quantize_(model, CONFIG, lambda m, name: isinstance(m, nn.Linear | nn.Embedding))
    report = resident(model, "int8")
    assert len(report.weights) == 15
    assert all(row.resident == "int8" for row in report.weights)
    # The embedding is tied to the head, so it is used in whole at each step.
    tied = next(row for row in report.weights if "embed" in row.name or "lm_head" in row.name)
    found = {row.name: row.resident for row in resident(model, budget=tied.resident_bytes).weights}
    assert found[tied.name] == "int8"
    assert list(found.values()).count("int8") == 1


@pytest.mark.feature("Memory", "`resident` keeps weights as int8 levels or dense", "compiled too")
@pytest.mark.parametrize("form", ["int8", "dense"])
def test_compiled(model: Mixed, form: str) -> None:
    compiled = torch.compile(model, fullgraph=True)
    bits = compiled(INDICES)
    resident(model, form)
    expected = model(INDICES)
    torch.testing.assert_close(compiled(INDICES), expected, rtol=1e-5, atol=1e-5)
    if form == "int8":
        assert not torch.equal(compiled(INDICES), bits)
    resident(model, "bits")
    torch.testing.assert_close(compiled(INDICES), bits, rtol=1e-5, atol=1e-5)


def test_weights_elsewhere_are_refused(model: Mixed) -> None:
    layers = nn.ModuleDict({"here": model, "there": copy.deepcopy(model.first).to("meta")})
    for call in ({"form": "int8"}, {"form": "dense"}, {"budget": 10**6}):
        with pytest.raises(ValueError, match=r"there\.weight is on meta: allowed: weights on"):
            resident(layers, **call)
        assert set(forms(model).values()) == {"bits"}
