"""`quantize_` on models: which layers, shared weights, interrupts, reports and the way back."""

import _thread
import copy
import json
import pickle
import signal
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torchao.quantization
from conftest import snr_db
from torch import Tensor, nn
from torchao.quantization import FqnToConfig

from torchcodec_weights import (
    CodecError,
    CodecTensor,
    RateError,
    codec_weight_only,
    compression_report,
    decompress_,
    quantize_,
)

CONFIG = codec_weight_only("h264", bits=3, preset="fast")


class Block(nn.Module):
    """Four real matrices of a transformer's layer."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        prefix = "encoder.layer.3."
        self.query = self._linear(weights, prefix + "attention.self.query")
        self.value = self._linear(weights, prefix + "attention.self.value")
        self.up = self._linear(weights, prefix + "intermediate.dense")
        self.down = self._linear(weights, prefix + "output.dense")

    @staticmethod
    def _linear(weights: dict[str, Tensor], name: str) -> nn.Linear:
        weight = weights[name + ".weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight = nn.Parameter(weight.clone())
        layer.bias = nn.Parameter(weights[name + ".bias"].clone())
        return layer

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.query(x) * self.value(x).sigmoid()
        return self.down(torch.nn.functional.gelu(self.up(x)))


@pytest.fixture
def block(minilm: dict[str, Tensor]) -> Block:
    return Block(minilm)


def coded_names(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if isinstance(p.data, CodecTensor)}


@pytest.mark.parametrize("quantize", [quantize_, torchao.quantization.quantize_])
def test_every_linear_weight_is_encoded(block: Block, quantize: object) -> None:
    x = torch.randn(4, 384, generator=torch.Generator().manual_seed(0))
    before = block(x)
    quantize(block, codec_weight_only("h264", bits=6, preset="fast"))  # type: ignore[operator]
    assert coded_names(block) == {f"{n}.weight" for n in ("query", "value", "up", "down")}
    assert not any(p.requires_grad for n, p in block.named_parameters() if n.endswith("weight"))
    assert snr_db(before, block(x)) > 22


def test_filter_fn(block: Block) -> None:
    quantize_(block, CONFIG, lambda module, name: name in ("up", "query"))
    assert coded_names(block) == {"up.weight", "query.weight"}


def test_fqn_to_config(block: Block) -> None:
    fine = codec_weight_only("hevc", bits=4, preset="fast")
    quantize_(block, FqnToConfig({"re:.*up": fine, "down": None, "_default": CONFIG}))
    codecs = {
        row.name: (row.codec, row.bits_per_weight) for row in compression_report(block).weights
    }
    assert set(codecs) == {"query.weight", "value.weight", "up.weight"}
    assert codecs["up.weight"][0] == "hevc"
    assert 3.97 < codecs["up.weight"][1] <= 4
    assert codecs["query.weight"][0] == "h264"
    assert 2.97 < codecs["query.weight"][1] <= 3


def test_progress_shows_layers_and_rate(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    quantize_(block, CONFIG)
    shown = capsys.readouterr().err
    assert "4/4 layers, 2.9" in shown


def test_shared_weights_are_encoded_once_and_stay_shared(block: Block) -> None:
    block.value.weight = block.query.weight
    quantize_(block, CONFIG)
    assert block.value.weight is block.query.weight
    assert isinstance(block.value.weight.data, CodecTensor)
    assert len(compression_report(block).weights) == 3
    decompress_(block)
    assert block.value.weight is block.query.weight


def test_a_weight_shared_with_what_stays_dense_stays_dense(block: Block) -> None:
    embedding = nn.Embedding(384, 384)
    embedding.weight = block.query.weight
    model = nn.ModuleDict({"block": block, "embedding": embedding})
    with pytest.warns(UserWarning, match=r"block.query.weight is shared with embedding.weight"):
        quantize_(model, CONFIG)
    assert embedding.weight is block.query.weight
    assert "block.query.weight" not in coded_names(model)


def test_a_small_matrix_that_cannot_be_coded_stays_dense_with_a_warning() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(300, 300))
    with pytest.warns(UserWarning, match=r"0\.weight stays dense: bits=3 cannot be reached"):
        quantize_(model, CONFIG)
    assert coded_names(model) == {"1.weight"}


def test_bad_weights_stop_everything_before_any_work(block: Block) -> None:
    with torch.no_grad():
        block.down.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"down\.weight: weight holds NaN"):
        quantize_(block, CONFIG)
    assert not coded_names(block)


def test_an_unreachable_rate_names_layer_and_nearest(block: Block) -> None:
    with pytest.raises(RateError, match=r"weight: bits=0\.01 cannot be reached.*nearest") as caught:
        quantize_(block, codec_weight_only("h264", bits=0.01, preset="fast"))
    assert 0.01 < caught.value.nearest < 0.3


def test_a_failing_encoder_leaves_every_layer_usable(block: Block) -> None:
    # H.266 level 1 has no pictures of this weight's size.
    bad = codec_weight_only("vvc", bits=2, preset="faster", encoder_params={"level": "1.0"})
    with pytest.raises(CodecError, match="libvvenc failed"):
        quantize_(block, FqnToConfig({"down": bad, "_default": CONFIG}))
    assert "down.weight" not in coded_names(block)
    assert torch.isfinite(block(torch.randn(2, 384))).all()


def test_interrupted_each_layer_is_old_or_new(
    block: Block, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchcodec_weights.models import quantize

    original = quantize._swap
    swapped = threading.Event()

    def swap_and_interrupt(owners: object, coded: object) -> None:
        original(owners, coded)  # type: ignore[arg-type]
        if not swapped.is_set():
            swapped.set()
            _thread.interrupt_main()  # what Ctrl-C does

    monkeypatch.setattr(quantize, "_swap", swap_and_interrupt)
    # A shell that starts tests in the background has SIGINT ignored, and so has Python then.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, former))
    dense = {name: parameter.data.clone() for name, parameter in block.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        quantize_(block, codec_weight_only("vvc", bits=2, preset="faster"))
    assert 1 <= len(coded_names(block)) < 4
    for name, parameter in block.named_parameters():
        if isinstance(parameter.data, CodecTensor):
            assert snr_db(dense[name], parameter.data.dequantize()) > 9
        else:
            assert torch.equal(parameter.data, dense[name])
    assert torch.isfinite(block(torch.randn(2, 384))).all()
    quantize_(
        block,
        CONFIG,
        lambda m, n: isinstance(m, nn.Linear) and n + ".weight" not in coded_names(block),
    )
    assert len(coded_names(block)) == 4


def test_an_interrupt_ends_the_encoders_of_its_own_call_only(
    block: Block, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchcodec_weights.models import quantize

    other = copy.deepcopy(block)
    original, interrupted = quantize._swap, threading.Event()
    config = codec_weight_only("vvc", bits=2, preset="faster")

    def swap_and_interrupt(owners: object, coded: object) -> None:
        main = threading.current_thread() is threading.main_thread()
        if not main:
            interrupted.wait(60)  # whatever the machine is busy with, it ends after the interrupt
        original(owners, coded)  # type: ignore[arg-type]
        if main and not interrupted.is_set():
            interrupted.set()
            _thread.interrupt_main()

    monkeypatch.setattr(quantize, "_swap", swap_and_interrupt)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, former))
    with ThreadPoolExecutor(1) as pool:
        slow = codec_weight_only("vvc", bits=2, preset="slow")
        future = pool.submit(quantize_, other, slow)
        with pytest.raises(KeyboardInterrupt):
            quantize_(block, config)
        assert not future.done(), "the other call was to be under way"
        future.result()
    assert len(coded_names(other)) == 4
    assert len(coded_names(block)) < 4


def test_encoding_again_is_refused(block: Block) -> None:
    quantize_(block, CONFIG)
    with pytest.raises(ValueError, match="is a CodecTensor already"):
        quantize_(block, CONFIG)


def test_report(block: Block) -> None:
    dense_bytes = sum(p.nbytes for n, p in block.named_parameters() if n.endswith("weight"))
    bias_bytes = sum(p.nbytes for n, p in block.named_parameters() if n.endswith("bias"))
    quantize_(block, CONFIG)
    report = compression_report(block)
    assert report.dense_bytes == dense_bytes
    assert report.other_bytes == bias_bytes
    assert 2.97 < report.bits_per_weight <= 3
    assert report.stored_bytes == sum(row.stored_bytes for row in report.weights)
    table = str(report)
    assert "up.weight" in table
    assert "1536 x 384" in table
    parsed = json.loads(report.to_json())
    assert parsed["stored_bytes"] == report.stored_bytes
    assert {row["name"] for row in parsed["weights"]} == coded_names(block)


def test_report_of_a_slice(minilm: dict[str, Tensor]) -> None:
    weight = minilm["encoder.layer.3.intermediate.dense.weight"].repeat(2, 1)
    layer = nn.Linear(*weight.shape[::-1], bias=False)
    coded = CodecTensor.from_hp(weight, codec_weight_only("ectcq", bits=2, preset="fast"))
    layer.weight = nn.Parameter(coded[:1000].clone(), requires_grad=False)
    report = compression_report(layer)
    (row,) = report.weights
    assert row.shape == (1000, 384)
    assert 0 < row.tiles < len(coded.header.tiles)
    assert report.bits_per_weight == pytest.approx(row.bits_per_weight)
    assert report.bits_per_weight == pytest.approx(8 * row.stored_bytes / (1000 * 384))


def test_decompress(block: Block) -> None:
    x = torch.randn(3, 384)
    quantize_(block, CONFIG)
    expected = block(x)
    assert "CodecTensor" in repr(block)
    assert decompress_(block) is block
    assert not coded_names(block)
    assert "CodecTensor" not in repr(block)
    torch.testing.assert_close(block(x), expected)
    assert not compression_report(block).weights


def test_the_model_is_printed_with_its_rates(block: Block) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(block, CONFIG)
    assert "codec='h264'" in repr(block.up)


class Named(nn.Linear):
    def extra_repr(self) -> str:
        return "of my own class"


def test_a_model_is_pickled_for_other_processes() -> None:
    model = nn.Sequential(nn.Linear(256, 256))
    quantize_(model, codec_weight_only(bits=3, preset="fast"))
    again = pickle.loads(pickle.dumps(model))
    assert repr(again) == repr(model)
    x = torch.randn(2, 256)
    assert torch.equal(again(x), model(x))


def test_modules_that_print_themselves_go_on_doing_so() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), Named(64, 64), nn.ReLU())
    for module in (model[1], model[3]):
        module.extra_repr = lambda: "of my own"  # type: ignore[method-assign]
    quantize_(model, codec_weight_only("ectcq", bits=3, preset="fast"))
    printed = [repr(module) for module in model]
    assert "codec='ectcq'" in printed[0]
    assert printed[1:] == ["Linear(of my own)", "Named(of my own class)", "ReLU(of my own)"]
    decompress_(model)
    assert repr(model[0]) == "Linear(in_features=64, out_features=64, bias=True)"
    assert [repr(module) for module in model[1:]] == printed[1:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one must be given, got none"),
        ({"bits": 2, "step": 0.5}, "exactly one must be given"),
        ({"bits": -1}, "bits=-1: allowed: finite numbers above 0"),
        ({"bits": "two"}, "bits='two': allowed: a number"),
        ({"snr_db": float("nan")}, "snr_db=nan: allowed: finite"),
        ({"bits": 2, "preset": "best"}, "preset='best' with codec 'vvc': allowed"),
    ],
)
def test_bad_configurations(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec_weight_only("vvc", **arguments)  # type: ignore[arg-type]
