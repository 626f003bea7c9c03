"""Operators, torch.compile, torch.export: what is decoded, how often, and what stays alive."""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchao.quantization
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from torchcodec_weights import CodecTensor, codec_weight_only, decoded_cache, quantize_
from torchcodec_weights.decoders import cpu
from torchcodec_weights.pytorch import operators

GROUP = "Compiling and exporting"


def encode(weight: Tensor, bits: float = 5) -> CodecTensor:
    return CodecTensor.from_hp(weight, codec_weight_only(bits=bits, preset="fast"))


def coded_linear(cols: int, rows: int, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(cols, rows)
    layer.weight = nn.Parameter(encode(layer.weight.detach()), requires_grad=False)
    return layer


@pytest.fixture
def model() -> nn.Sequential:
    """Five layers of equal shapes, whose bitstreams differ in length."""
    layers = []
    for seed in range(5):
        layers += [coded_linear(128, 128, seed), nn.ReLU()]
    lengths = {layer.weight.qdata.numel() for layer in layers[::2]}
    assert len(lengths) > 1
    return nn.Sequential(*layers)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rand(*shape: int, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).requires_grad_(grad)


@pytest.mark.feature(
    "Operators", "`torch.library.opcheck`", "linear, convolution, embedding, dequantize"
)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool) -> None:
    weight = encode(rand(96, 64))
    arguments = weight.coded
    window = weight.resolved_window
    bias = rand(96, grad=grad)
    torch.library.opcheck(
        operators.linear, (rand(3, 5, 64, grad=grad), *arguments, bias, window, False)
    )
    torch.library.opcheck(
        operators.linear, (rand(3, 96, grad=grad), *arguments, None, window, True)
    )
    torch.library.opcheck(operators.dequantize, (*arguments, window, torch.bfloat16))
    indices = torch.tensor([[0, 5], [95, 5]])
    torch.library.opcheck(operators.embedding, (indices, *arguments, window, torch.float32))
    kernel = encode(rand(16, 8, 3, 3), 8)
    torch.library.opcheck(
        operators.convolution,
        (
            rand(2, 8, 9, 11, grad=grad),
            *kernel.coded,
            rand(16, grad=grad),
            kernel.resolved_window,
            [16, 8, 3, 3],
            [2, 1],
            [1, 0],
            [1, 2],
            False,
            [0, 0],
            1,
        ),
    )


@pytest.mark.feature("Operators", "`torch.vmap` over the input and the bias")
def test_vmap() -> None:
    weight = encode(rand(96, 64))
    x, biases = rand(4, 3, 64), rand(4, 96)
    product = torch.vmap(lambda a, b: F.linear(a, weight, b))(x, biases)
    expected = torch.stack([F.linear(a, weight, b) for a, b in zip(x, biases, strict=True)])
    torch.testing.assert_close(product, expected)


@pytest.mark.feature(GROUP, "`torch.compile(fullgraph=True)`, inductor and aot_eager")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("grad", [False, True])
def test_compile(model: nn.Sequential, backend: str, grad: bool) -> None:
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = rand(3, 128, grad=grad)
    with torch.set_grad_enabled(grad):
        expected, got = model(x), compiled(x)
    torch.testing.assert_close(got, expected)
    if grad:
        (want,) = torch.autograd.grad(expected.square().sum(), x)
        (have,) = torch.autograd.grad(got.square().sum(), x)
        torch.testing.assert_close(have, want)


@pytest.mark.feature(
    GROUP,
    "one graph for layers of one shape, whatever the lengths of their bitstreams",
    "compiling block by block",
)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_for_many_layers(model: nn.Sequential, backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    x = rand(3, 128)
    with torch.no_grad():
        for layer in model[::2]:
            block = nn.Sequential(layer, nn.ReLU())
            compiled = torch.compile(block, fullgraph=True, backend=counter)
            torch.testing.assert_close(compiled(x), block(x))
    assert counter.frame_count == 1


@pytest.mark.feature(GROUP, "dynamic batch", "compiled once more when the batch first changes")
def test_dynamic_batch(model: nn.Sequential) -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch in (3, 4, 7, 30):
            torch.testing.assert_close(compiled(rand(batch, 128)), model(rand(batch, 128)))
    assert counter.frame_count <= 2
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for batch in (3, 4, 7, 30):
            compiled(rand(batch, 128))
    assert counter.frame_count == 1


@pytest.mark.feature(GROUP, "`torch.export`, saved and loaded, dynamic batch")
def test_export(model: nn.Sequential, tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=512)
    exported = torch.export.export(model, (rand(3, 128),), dynamic_shapes=({0: batch},))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert "torchcodec_weights.linear.default" in targets
    assert "torchcodec_weights.dequantize.default" not in targets
    path = tmp_path / "model.pt2"
    torch.export.save(exported, path)
    dense = sum(layer.weight.numel() for layer in model[::2]) * 4
    assert path.stat().st_size < dense / 2
    loaded = torch.export.load(path).module()
    for size in (1, 9, 40):
        torch.testing.assert_close(loaded(rand(size, 128)), model(rand(size, 128)))


@pytest.mark.feature(
    GROUP, "AOTInductor", "run in a Python process that imports torchcodec_weights"
)
def test_aot_inductor(model: nn.Sequential, tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=512)
    with torch.no_grad():
        exported = torch.export.export(model, (rand(3, 128),), dynamic_shapes=({0: batch},))
        package = torch._inductor.aoti_compile_and_package(
            exported.run_decompositions(), package_path=str(tmp_path / "model.pt2")
        )
        loaded = torch._inductor.aoti_load_package(package)
        torch.testing.assert_close(loaded(rand(9, 128)), model(rand(9, 128)))


@pytest.mark.feature(GROUP, "autocast, eager and compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    layer = coded_linear(128, 64)
    x = rand(3, 128)
    dense = nn.Linear(128, 64)
    dense.load_state_dict({**layer.state_dict(), "weight": layer.weight.dequantize()})
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        expected = dense(x)
        assert expected.dtype == dtype
        for run in (layer, compiled):
            torch.testing.assert_close(run(x), expected, rtol=2e-2, atol=2e-2)


@dataclass
class Decodes:
    """Decoded weights: how many there were, and the most that lived at one time."""

    count: int = 0
    most_alive: int = 0
    alive: list[weakref.ref[Tensor]] = field(default_factory=list)

    def watch(self, decode: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(*args: Any) -> Tensor:
            weight = decode(*args)
            self.count += 1
            self.alive.append(weakref.ref(weight))
            self.most_alive = max(self.most_alive, self.living)
            return weight

        return watched

    @property
    def living(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self.alive)


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> Decodes:
    """Counts decodes of a codec whose product takes the dense weight."""
    seen = Decodes()
    monkeypatch.setattr(cpu, "decode_matrix", seen.watch(cpu.decode_matrix))
    monkeypatch.setattr("torchcodec_weights.codecs.ectcq.codec.ECTCQ.decodes_whole", False)
    return seen


def _exported(model: nn.Module, x: Tensor) -> nn.Module:
    return torch.export.export(model, (x,)).module()


def _frozen(model: nn.Module, x: Tensor) -> Any:
    torch._inductor.config.freezing = True
    try:
        compiled = torch.compile(model, fullgraph=True)
        with torch.no_grad():
            compiled(x)
    finally:
        torch._inductor.config.freezing = False
    return compiled


@pytest.mark.feature(
    "Memory", "no decoded weight outlives its use", "eager, compiled, inductor's freezing, exported"
)
@pytest.mark.parametrize(
    "prepare",
    [
        lambda model, x: model,
        lambda model, x: torch.compile(model, fullgraph=True),
        lambda model, x: torch.compile(model, fullgraph=True, backend="aot_eager"),
        _frozen,
        _exported,
    ],
    ids=["eager", "inductor", "aot_eager", "freezing", "exported"],
)
def test_one_weight_at_a_time(model: nn.Sequential, decodes: Decodes, prepare: Any) -> None:
    x = rand(3, 128)
    run = prepare(model, x)
    with torch.no_grad():
        run(x)
        decodes.count = decodes.most_alive = 0
        run(x)
    assert decodes.count == 5
    assert decodes.most_alive == 1
    assert decodes.living == 0


@pytest.mark.feature(
    "Memory", "the backward pass decodes again, nothing is kept for it", "eager, compiled, exported"
)
@pytest.mark.parametrize("how", ["eager", "inductor", "aot_eager", "exported"])
def test_gradients_keep_no_weight(model: nn.Sequential, decodes: Decodes, how: str) -> None:
    x = rand(3, 128, grad=True)
    run: Any = model
    if how == "exported":
        run = _exported(model, x.detach())
    elif how != "eager":
        run = torch.compile(model, fullgraph=True, backend=how)
    torch.autograd.grad(run(x).square().sum(), x)
    decodes.count = decodes.most_alive = 0
    loss = run(x).square().sum()
    assert decodes.count == 5
    assert decodes.living == 0
    torch.autograd.grad(loss, x)
    assert decodes.count == 10
    assert decodes.most_alive == 1


@pytest.mark.feature("Memory", "`decoded_cache` keeps decoded weights within its budget")
@pytest.mark.parametrize("how", ["eager", "inductor"])
def test_only_the_cache_keeps_weights(model: nn.Sequential, decodes: Decodes, how: str) -> None:
    run: Any = model if how == "eager" else torch.compile(model, fullgraph=True)
    x = rand(3, 128)
    with torch.no_grad():
        expected = run(x)
        with decoded_cache(5 * 128 * 128 * 4):
            run(x)
            decodes.count = 0
            assert torch.equal(run(x), expected)
            assert decodes.count == 0
            assert decodes.living == 5
    assert decodes.living == 0


def test_fused_products_are_in_the_graph_too(model: nn.Sequential) -> None:
    """With the codec's own product, compiled and eager agree to the last bit."""
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(rand(3, 128)), model(rand(3, 128)))


@pytest.mark.feature(GROUP, "`from_hp` and `quantize_` in a compiled function", "break the graph")
@pytest.mark.parametrize("quantize", [quantize_, torchao.quantization.quantize_])
def test_encoding_in_a_compiled_function(quantize: Callable[..., None]) -> None:
    config = codec_weight_only(bits=5, preset="fast")

    def encode_weight(weight: Tensor) -> Tensor:
        return CodecTensor.from_hp(2 * weight, config)

    def encode_and_run(layer: nn.Linear, x: Tensor) -> Tensor:
        y = x + 1
        quantize(layer, config)
        return layer(y) - 1

    weight, x = rand(128, 256), rand(3, 256)
    coded = torch.compile(encode_weight)(weight)
    assert isinstance(coded, CodecTensor)
    assert torch.equal(coded.dequantize(), encode(2 * weight).dequantize())
    layer = nn.Linear(256, 128)
    result = torch.compile(encode_and_run)(layer, x)
    assert isinstance(layer.weight, CodecTensor)
    torch.testing.assert_close(result, layer(x + 1) - 1)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="encoders of torchcodec_weights read and write bytes"):
        torch.compile(encode_weight, fullgraph=True)(weight)
