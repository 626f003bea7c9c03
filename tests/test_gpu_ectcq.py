"""ECTCQ on a CUDA device: weights stay compressed there, and are decoded and multiplied there."""

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from conftest import tiny_llama
from test_order import important
from torch import Tensor, nn
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


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 17, 300])
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
