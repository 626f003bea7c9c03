"""Decoding on a CUDA device: hardware decoders, uploads, weights kept and decoded ahead.

Everything here needs a GPU and skips without one, or without the package that a test is about. What
is compared is bits: the device's weight against the CPU's.
"""

import warnings
from collections.abc import Iterator

import pytest
import torch
from conftest import coded
from torch import Tensor, nn
from torch.nn import functional as F

from torchcodec_weights import (
    CodecError,
    CodecTensor,
    CodecUnavailableError,
    available_codecs,
    codec_weight_only,
    compression_report,
    decoded_cache,
    quantize_,
    use_decoder,
)
from torchcodec_weights.codecs.image import nvimage
from torchcodec_weights.codecs.pictures import SampleCodec
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.codecs.video import nvdec
from torchcodec_weights.decoders import choice
from torchcodec_weights.decoders.cache import CACHE
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.opened import open_matrix

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

VIDEO = [("hevc", 8), ("hevc", 10), ("h264", 8), ("vp9", 8), ("av1", 8), ("av1", 10)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def _fresh(forgotten_choices: None) -> Iterator[None]:
    yield
    CACHE.resize(0)


@pytest.fixture(scope="module")
def wide() -> Tensor:
    """Several tiles of pictures that the hardware takes, with outliers and means of rows."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(700, 2048, generator=generator)
    weight[::50, ::200] *= 30
    return weight * torch.rand(700, 1, generator=generator) + torch.linspace(-1, 1, 700)[:, None]


def needs_nvdec(codec: str, depth: int) -> None:
    kind = get_codec(codec)
    assert isinstance(kind, SampleCodec)
    reason = nvdec.DECODER.missing(kind, cuda())
    if reason is not None:
        pytest.skip(reason)
    if not nvdec._capabilities(codec, depth, cuda().index).supported:
        pytest.skip(f"the chip does not decode {codec} at {depth} bits")


def needs_nvimage() -> None:
    module, reason = nvimage.nvimgcodec()
    if module is None:
        pytest.skip(str(reason))


def same(on_cpu: CodecTensor, on_gpu: CodecTensor, dtype: torch.dtype) -> None:
    found = on_gpu.dequantize(dtype)
    assert found.is_cuda
    assert torch.equal(found.cpu(), on_cpu.dequantize(dtype))


@pytest.mark.parametrize(("codec", "depth"), VIDEO)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nvdec_gives_the_bits_of_the_cpu(
    wide: Tensor, codec: str, depth: int, dtype: torch.dtype
) -> None:
    needs_nvdec(codec, depth)
    tensor = coded(wide, codec, depth)
    moved = tensor.to(cuda())
    with use_decoder(codec, "cuda"):  # no way back to the CPU
        for _ in range(3):
            same(tensor, moved, dtype)
        assert torch.equal(
            moved[300:310].dequantize(dtype).cpu(), tensor[300:310].dequantize(dtype)
        )


@pytest.mark.parametrize("rows", [36, 160, 300])
def test_nvdec_of_any_height_falls_back_or_is_right(rows: int) -> None:
    needs_nvdec("hevc", 10)
    weight = torch.randn(rows, 4096, generator=torch.Generator().manual_seed(1))
    tensor = CodecTensor.from_hp(weight, codec_weight_only("hevc", step=0.5, preset="fast"))
    moved = tensor.to(cuda())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            same(tensor, moved, torch.float32)
    said = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    assert len([text for text in said if "'hevc' is decoded on the CPU" in text]) == (rows < 144)


def test_many_threads_share_the_engines(wide: Tensor) -> None:
    needs_nvdec("hevc", 10)
    from concurrent.futures import ThreadPoolExecutor

    tensor = coded(wide, "hevc", 10)
    moved, expected = tensor.to(cuda()), tensor.dequantize()

    def decode(_: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream(cuda())):
            return torch.equal(moved.dequantize().cpu(), expected)

    with use_decoder("hevc", "cuda"), ThreadPoolExecutor(4) as pool:
        assert all(pool.map(decode, range(16)))


@pytest.mark.parametrize("codec", ["hevc", "vvc"])
def test_a_corrupt_tile_is_an_error(wide: Tensor, codec: str) -> None:
    tensor = coded(wide[:150, :512].contiguous(), codec)
    tensor.qdata[-200] ^= 4
    moved = tensor.to(cuda())
    with pytest.raises(CodecError, match="is corrupt"):
        moved.dequantize()


@pytest.mark.parametrize(
    ("codec", "depth"), [("jpeg2000", 8), ("jpeg2000", 16), ("htj2k", 8), ("htj2k", 16)]
)
def test_nvimagecodec_gives_the_bits_of_the_cpu(wide: Tensor, codec: str, depth: int) -> None:
    needs_nvimage()
    tensor = coded(wide, codec, depth)
    moved = tensor.to(cuda())
    with use_decoder(codec, "cuda"):
        for dtype in DTYPES:
            same(tensor, moved, dtype)


def test_forced_to_the_device_where_it_cannot() -> None:
    tensor = coded(torch.randn(40, 40), "hevc", 10).to(cuda())
    with use_decoder("hevc", "cuda"), pytest.raises(CodecUnavailableError, match="use_decoder"):
        tensor.dequantize()


@pytest.mark.parametrize("codec", ["vvc", "jpeg", "jpegxl", "lossless"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoded_on_the_cpu_and_uploaded(wide: Tensor, codec: str, dtype: torch.dtype) -> None:
    weight = wide[:300, :512].contiguous()
    if codec == "lossless":
        tensor = CodecTensor.from_hp(weight, codec_weight_only(codec))
    else:
        tensor = coded(weight, codec)
    moved = tensor.to(cuda())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for _ in range(3):
            same(tensor, moved, dtype)
    part = moved[17:90, 5:400].dequantize(dtype)
    assert torch.equal(part.cpu(), tensor[17:90, 5:400].dequantize(dtype))


def test_uploads_do_not_overtake_each_other() -> None:
    """Products in flight while weights are decoded into memory that was just freed."""
    torch.manual_seed(0)
    dense = [torch.randn(256, 256) for _ in range(6)]
    tensors = [coded(weight, "h264").to(cuda()) for weight in dense]
    x = torch.randn(4096, 256, device=cuda())
    with use_decoder("h264", "cpu"):
        expected = [F.linear(x, tensor.dequantize()).cpu() for tensor in tensors]
        for _ in range(5):
            products = [F.linear(x, tensor) for tensor in tensors]
            for product, right in zip(products, expected, strict=True):
                assert torch.equal(product.cpu(), right)


def test_the_bitstream_is_copied_to_the_host_once(
    wide: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = coded(wide[:200, :256].contiguous(), "vvc").to(cuda())
    moved.dequantize()
    original, copied = Tensor.cpu, []

    def watched(tensor: Tensor, *args: object) -> Tensor:
        copied.append(tensor.is_cuda)
        return original(tensor, *args)

    monkeypatch.setattr(Tensor, "cpu", watched)
    for _ in range(3):
        moved.dequantize()
    assert not any(copied)


def test_rows_of_an_embedding(wide: Tensor) -> None:
    table = nn.Embedding(700, 512)
    table.weight = nn.Parameter(coded(wide[:, :512].contiguous(), "vvc"), requires_grad=False)
    indices = torch.tensor([[3, 699], [3, 350]])
    expected = table(indices)
    assert torch.equal(table.to(cuda())(indices.to(cuda())).cpu(), expected)
    with decoded_cache(4 * wide.numel()):
        whole = table.weight.dequantize()
        assert torch.equal(table(indices.to(cuda())), F.embedding(indices.to(cuda()), whole))


@pytest.mark.parametrize("capacity", [1, 3, 6])
def test_weights_are_decoded_ahead(capacity: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)])
    quantize_(model, codec_weight_only("h264", bits=4, preset="fast"))
    model = model.requires_grad_(False).to(cuda())
    x = torch.randn(64, 256, device=cuda())
    with use_decoder("h264", "cpu"):
        expected = model(x)
        with decoded_cache(capacity * 256 * 256 * 4):
            for _ in range(4):
                assert torch.equal(model(x), expected)
            side = torch.cuda.Stream(cuda())
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                product = model(x)
            side.synchronize()
            assert torch.equal(product, expected)


def test_a_cuda_graph_of_kept_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)])
    quantize_(model, codec_weight_only("vvc", bits=4, preset="faster"))
    model = model.requires_grad_(False).to(cuda())
    x = torch.randn(8, 256, device=cuda())
    with decoded_cache(4 * 256 * 256 * 4):
        for _ in range(2):
            expected = model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            product = model(x)
    torch.empty(2**24, device=cuda()).fill_(7)  # what a freed weight's memory would hold
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(product, expected)


def test_a_cuda_graph_beyond_the_budget_is_an_error() -> None:
    tensor = coded(torch.randn(256, 256), "vvc").to(cuda())
    x = torch.randn(8, 256, device=cuda())
    F.linear(x, tensor)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(CodecError, match=r"'vvc' cannot be decoded while .* decoded_cache"),
        torch.cuda.graph(graph),
    ):
        F.linear(x, tensor)


def test_inference_mode_and_gradients(wide: Tensor) -> None:
    tensor = coded(wide[:, :512].contiguous(), "hevc", 10)
    moved = tensor.to(cuda())
    with torch.inference_mode():
        same(tensor, moved, torch.float32)
    x = torch.randn(3, 512, device=cuda(), requires_grad=True)
    F.linear(x, moved).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad[0].cpu(), tensor.dequantize().sum(0), rtol=1e-4, atol=1e-2)


def test_every_codec_says_what_decodes_it() -> None:
    for info in available_codecs():
        assert ("cuda" in info.decoders) == bool(info.decoders)
    infos = {info.name: info for info in available_codecs()}
    assert infos["vvc"].decoders["cuda"] == "vvc (PyAV) on the CPU, uploaded"


def test_the_report_names_the_decoder_of_the_device(wide: Tensor) -> None:
    needs_nvdec("hevc", 10)
    model = nn.Linear(2048, 700, bias=False)
    model.weight = nn.Parameter(coded(wide, "hevc", 10), requires_grad=False)
    assert compression_report(model).weights[0].decoder == "hevc (PyAV)"
    model.to(cuda())
    assert compression_report(model).weights[0].decoder == nvdec.NVDEC.name
    with use_decoder("hevc", "cpu"):
        text = compression_report(model).weights[0].decoder
        assert text == "hevc (PyAV) on the CPU, uploaded (use_decoder says so)"


def test_code_of_a_window(wide: Tensor) -> None:
    """`choice.decode` by itself, for a window of rows and columns."""
    tensor = coded(wide, "h264")
    window = Window(123, 200, 17, 900)
    matrix = open_matrix(*tensor.to(cuda()).coded)
    found = choice.decode(matrix, window, torch.bfloat16, cuda())
    assert found.is_contiguous()
    assert torch.equal(found.cpu(), tensor.dequantize(torch.bfloat16)[123:323, 17:917])
