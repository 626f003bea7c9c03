"""ECTCQ on a CUDA device: weights stay compressed there, and are decoded and multiplied there."""

import copy
import gc
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import tiny_llama
from test_order import important
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from torchcodec_weights import (
    CodecError,
    CodecTensor,
    available_codecs,
    codec_weight_only,
    compression_report,
    quantize_,
    use_decoder,
)
from torchcodec_weights.codecs.common import cuda
from torchcodec_weights.codecs.ectcq.columns import is_by_columns
from torchcodec_weights.matrix.opened import open_matrix

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=f"{cuda.missing()}")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """None may fall back to the CPU unseen."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*decoded on the CPU.*")
        yield


@pytest.fixture(scope="module", params=["rows", "columns"])
def coded(request: pytest.FixtureRequest) -> CodecTensor:
    """A weight with outliers, by rows and by columns; tests must not change it."""
    weight = torch.randn(3000, 1024, generator=torch.Generator().manual_seed(0))
    weight[::100, ::100] *= 30
    config = codec_weight_only("ectcq", bits=2, preset="fast")
    if request.param == "columns":
        config = config.with_importance(important(weight), 2)
    tensor = CodecTensor.from_hp(weight, config)
    assert is_by_columns(tensor.header.private) == (request.param == "columns")
    return tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weight_is_that_of_the_cpu(coded: CodecTensor, dtype: torch.dtype) -> None:
    there = coded.cuda()
    weight = torch.ops.torchcodec_weights.dequantize(*there.coded, there.resolved_window, dtype)
    host = torch.ops.torchcodec_weights.dequantize(*coded.coded, coded.resolved_window, dtype)
    assert weight.is_cuda
    assert torch.equal(weight.cpu().view(torch.uint8), host.view(torch.uint8))
    with use_decoder("ectcq", "cpu"):
        assert torch.equal(there.dequantize().cpu(), coded.dequantize())
    with use_decoder("ectcq", "cuda"):
        assert torch.equal(there.dequantize().cpu(), coded.dequantize())


def test_slices(coded: CodecTensor) -> None:
    there, dense = coded.cuda(), coded.dequantize()
    assert torch.equal(there[700:900].dequantize().cpu(), dense[700:900])
    assert torch.equal(there[:, 5:99].dequantize().cpu(), dense[:, 5:99])
    assert torch.equal(there[1200:1300].clone().dequantize().cpu(), dense[1200:1300])
    x = torch.randn(3, 94, device="cuda")
    expected = x.double() @ dense[50:60, 5:99].double().cuda().T
    assert torch.allclose(F.linear(x, there[50:60, 5:99]).double(), expected, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 9, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_linear(coded: CodecTensor, tokens: int, dtype: torch.dtype, biased: bool) -> None:
    there = coded.to(dtype).cuda()
    x = torch.randn(tokens, 1024, device="cuda").to(dtype)
    bias = torch.randn(3000, device="cuda").to(dtype) if biased else None
    expected = x.double() @ coded.dequantize().cuda().to(dtype).double().T
    if bias is not None:
        expected += bias.double()
    product = F.linear(x, there, bias)
    assert product.dtype == dtype
    tolerance = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    assert (product.double() - expected).abs().max() < tolerance * expected.abs().max()


def test_products_are_the_same_in_each_run(coded: CodecTensor) -> None:
    there, x = coded.cuda(), torch.randn(5, 1024, device="cuda")
    first = F.linear(x, there)
    assert all(torch.equal(F.linear(x, there), first) for _ in range(20))


def test_gradients(coded: CodecTensor) -> None:
    there, dense = coded.cuda(), coded.dequantize().cuda()
    x = torch.randn(4, 1024, device="cuda", requires_grad=True)
    F.linear(x, there).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    F.linear(other, dense).square().sum().backward()
    assert x.grad is not None
    assert other.grad is not None
    assert torch.allclose(x.grad, other.grad, rtol=1e-2, atol=1e-2 * float(other.grad.abs().max()))


def test_embedding(coded: CodecTensor) -> None:
    there, dense = coded.cuda(), coded.dequantize()
    indices = torch.tensor([[0, 2999, 5], [77, 77, 1500]])
    assert torch.equal(F.embedding(indices.cuda(), there).cpu(), F.embedding(indices, dense))


def test_a_model_stays_compressed_on_the_device() -> None:
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(4)]).bfloat16()
    dense = sum(weight.nbytes for weight in model.parameters())
    quantize_(model, codec_weight_only("ectcq", bits=2, preset="fast"))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model.cuda()
    x = torch.randn(1, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        model(x)  # indexes
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 0.17 * dense
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        model(x)
    assert torch.cuda.max_memory_allocated() - before < 0.18 * dense
    report = compression_report(model)
    assert "ectcq (CUDA kernels)" in str(report)
    assert [i.decoders["cuda"] for i in available_codecs() if i.name == "ectcq"] == [
        "ectcq (CUDA kernels)"
    ]


def test_nothing_waits_for_the_device(coded: CodecTensor) -> None:
    there = coded.cuda()
    x = torch.randn(1, 1024, device="cuda")
    many = torch.randn(64, 1024, device="cuda")
    indices = torch.tensor([1, 2], device="cuda")
    F.linear(x, there)
    torch.cuda.set_sync_debug_mode("error")
    try:
        F.linear(x, there)
        F.linear(many, there)
        if not is_by_columns(coded.header.private):  # rows by number are decoded on the CPU then
            F.embedding(indices, there)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_and_streams(coded: CodecTensor) -> None:
    there = coded.cuda()
    x = torch.randn(2, 1024, device="cuda")
    unused, graph = coded.cuda(), torch.cuda.CUDAGraph()
    with pytest.raises(CodecError, match="first time while a CUDA graph"), torch.cuda.graph(graph):
        F.linear(x, unused)
    expected = F.linear(x, there)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product, weight = F.linear(x, there), there.dequantize()
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(weight.cpu(), coded.dequantize())
    assert torch.equal(product, F.linear(x, there))
    assert not torch.equal(product, expected)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        other = F.linear(x, there)
    side.synchronize()
    assert torch.equal(other, product)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str) -> None:
    model = nn.Sequential(nn.Linear(512, 256), nn.GELU(), nn.Linear(256, 512)).bfloat16()
    quantize_(model, codec_weight_only("ectcq", bits=3, preset="fast"))
    model.cuda()
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    for _ in range(4):
        x = torch.randn(3, 512, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            assert torch.allclose(compiled(x), model(x), rtol=2e-2, atol=2e-2)


def layer_of(weight: CodecTensor) -> nn.Linear:
    """A layer of a copy of a weight, which was never used."""
    layer = nn.Linear(*reversed(weight.shape), bias=False, device="cuda")
    layer.weight = nn.Parameter(weight.cuda(), requires_grad=False)
    return layer


@torch.no_grad()
def test_compiled_before_the_first_use(coded: CodecTensor) -> None:
    """The index outlives the warm-up, in which the thread allocates from the graph's memory."""
    used = [layer_of(coded), layer_of(coded)]
    model = nn.Sequential(used[0], nn.GELU(), nn.Linear(3000, 1024, device="cuda"), used[1])
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    counters.clear()
    for tokens in (1, 40, 1):
        for _ in range(4):
            x = torch.randn(tokens, 1024, device="cuda")
            product = compiled(x).clone()
            assert torch.allclose(product, model(x), rtol=1e-2, atol=1e-2)
    for layer in used:
        assert torch.equal(layer.weight.dequantize().cpu(), coded.dequantize())
    assert not counters["inductor"]["cudagraph_skips"]
    torch.compiler.reset()


def test_first_use_in_many_threads_and_streams(coded: CodecTensor) -> None:
    x = torch.randn(4, 1024, device="cuda")
    expected = F.linear(x, coded.cuda())
    weights = [coded.cuda() for _ in range(4)]
    torch.cuda.synchronize()

    @torch.no_grad()
    def use(number: int) -> list[Tensor]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            products = [F.linear(x, weights[(number + i) % 4]) for i in range(8)]
        stream.synchronize()
        return products

    with ThreadPoolExecutor(8) as pool:
        for products in pool.map(use, range(24)):
            assert all(torch.equal(product, expected) for product in products)


def busy() -> None:
    """Work for the current stream that takes about a second on an H100."""
    large = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(large)
    for _ in range(600):
        torch.mm(large, large, out=out)


@torch.no_grad()
def test_a_weight_is_freed_while_another_stream_uses_it(coded: CodecTensor) -> None:
    """Its memory is not given to others before that stream has done what it was asked."""
    x = torch.randn(4, 1024, device="cuda")
    expected = F.linear(x, coded.cuda())
    other = torch.randn(3000, 1024, generator=torch.Generator().manual_seed(1))
    changed = CodecTensor.from_hp(other, codec_weight_only("ectcq", bits=2, preset="fast"))
    there, side = coded.cuda(), torch.cuda.Stream()
    F.linear(x, there)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        busy()
        product = F.linear(x, there)
    matrix = weakref.ref(open_matrix(*there.coded))
    del there
    gc.collect()
    assert matrix() is None
    for _ in range(3):  # their containers and indices would take the memory
        F.linear(x, changed.cuda())
    assert not side.query()  # the product was not there yet
    side.synchronize()
    assert torch.equal(product, expected)


def test_the_memory_of_an_index_comes_back(coded: CodecTensor) -> None:
    x = torch.randn(1, 1024, device="cuda")
    F.linear(x, coded.cuda())

    def taken() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.empty(1, device="cuda")  # the allocator looks for what is done at an allocation
        return torch.cuda.memory_stats()["active_bytes.all.current"]

    before = taken()
    for _ in range(5):
        F.linear(x, coded.cuda())
    assert taken() <= before


def test_damage_is_found(coded: CodecTensor) -> None:
    broken = coded.clone()
    broken.qdata[len(broken.qdata) // 2] ^= 1
    with pytest.raises(CodecError, match="corrupt"):
        F.linear(torch.randn(1, 1024, device="cuda"), broken.cuda())


def test_there_and_back(coded: CodecTensor) -> None:
    there = coded.cuda()
    F.linear(torch.randn(1, 1024, device="cuda"), there)
    back = there.cpu()
    assert torch.equal(back.qdata, coded.qdata)
    assert torch.equal(back.dequantize(), coded.dequantize())


def test_a_language_model() -> None:
    model = tiny_llama().bfloat16()
    quantize_(model, codec_weight_only("ectcq", bits=4, preset="fast"))
    there = copy.deepcopy(model).cuda()
    tokens: Tensor = torch.arange(20)[None] * 7 % 512
    with torch.no_grad():
        expected = model.float()(tokens).logits
        logits = there.float()(tokens.cuda()).logits
    assert torch.allclose(logits.cpu(), expected, rtol=1e-2, atol=1e-2)
