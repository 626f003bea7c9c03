"""What PyTorch's functions do with a CodecTensor: the same as with the decoded weight."""

import pytest
import torch
import torch.nn.functional as F
from conftest import snr_db
from torch import Tensor, nn
from torchao.quantization import FqnToConfig

from torchcodec_weights import (
    CodecError,
    CodecTensor,
    codec_weight_only,
    compression_report,
    decompress_,
    quantize_,
)

LAYERS = "Layers and shapes"
VIEWS = "Views and slices"


def rand(*shape: int, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).requires_grad_(grad)


def encode(weight: Tensor, bits: float = 5, codec: str = "ectcq") -> CodecTensor:
    return CodecTensor.from_hp(weight, codec_weight_only(codec, bits=bits, preset="fast"))


@pytest.fixture(scope="module", params=["ectcq", "h264"])
def weight(request: pytest.FixtureRequest) -> CodecTensor:
    """1000 x 700: several tiles, whose bounds are no round numbers."""
    coded = encode(rand(1000, 700), codec=request.param)
    assert len(coded.header.tiles) > 1
    return coded


@pytest.mark.feature(LAYERS, "`matmul`, `@`, `mm`, `addmm`, `.t()`, `.T`, `.mT`")
def test_products(weight: CodecTensor) -> None:
    dense = weight.dequantize()
    x, y, bias = rand(3, 700), rand(3, 1000), rand(700)
    for ours, theirs in (
        (x @ weight.t(), x @ dense.t()),
        (x @ weight.T, x @ dense.T),
        (x @ weight.mT, x @ dense.mT),
        (y @ weight, y @ dense),
        (torch.matmul(y, weight), y @ dense),
        (torch.mm(y, weight), y @ dense),
        (torch.addmm(bias, y, weight), torch.addmm(bias, y, dense)),
        (weight @ rand(700, 4), dense @ rand(700, 4)),
        (F.linear(y, weight.t()), F.linear(y, dense.t())),
        (y[0] @ weight, y[0] @ dense),
        (weight.t().dequantize(), dense.t()),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_gradients_of_products(weight: CodecTensor) -> None:
    dense = weight.dequantize()
    y = rand(3, 1000, grad=True)
    (ours,) = torch.autograd.grad((y @ weight).square().sum(), y, create_graph=True)
    (theirs,) = torch.autograd.grad((y @ dense).square().sum(), y, create_graph=True)
    assert snr_db(theirs, ours) > 100
    (twice,) = torch.autograd.grad(ours.square().sum(), y)
    (expected,) = torch.autograd.grad(theirs.square().sum(), y)
    assert snr_db(expected, twice) > 100


@pytest.mark.feature(VIEWS, "rows and columns of a matrix, `chunk`, `split`, `narrow`")
def test_slices(weight: CodecTensor) -> None:
    dense = weight.dequantize()
    for view, expected in (
        (weight[17:180], dense[17:180]),
        (weight[:, 100:333], dense[:, 100:333]),
        (weight[990:, 1:2], dense[990:, 1:2]),
        (weight[-3:], dense[-3:]),
        (weight.narrow(0, 250, 250), dense.narrow(0, 250, 250)),
        (weight.t()[5:9], dense.t()[5:9]),
        (weight.t()[:, 5:300], dense.t()[:, 5:300]),
        (weight[10:400][100:200, :300], dense[10:400][100:200, :300]),
        (weight.chunk(3)[2], dense.chunk(3)[2]),
        (weight.split([100, 900])[1], dense.split([100, 900])[1]),
        (weight.split(300, dim=1)[1], dense.split(300, dim=1)[1]),
    ):
        assert view.qdata.data_ptr() == weight.qdata.data_ptr(), "a view shares the bitstream"
        assert torch.equal(view.dequantize(), expected)
        for tokens in (2, 40):
            x = rand(tokens, expected.shape[1])
            torch.testing.assert_close(
                F.linear(x, view), F.linear(x, expected), rtol=1e-4, atol=1e-3
            )
        kept = view.clone()
        assert torch.equal(kept.dequantize(), expected)


@pytest.mark.feature(
    VIEWS, "`torch.cat`, `torch.stack` of slices of a weight", "of different weights refused"
)
def test_slices_are_joined_again(weight: CodecTensor) -> None:
    dense = weight.dequantize()
    swapped = weight.t()
    parts = [part.contiguous() for part in weight[100:].split([201, 333, 366])]
    assert sum(part.stored_bytes for part in parts) < 2 * weight.stored_bytes
    for joined, expected in (
        (torch.cat(weight.chunk(3)), dense),
        (torch.cat(weight.split([1, 600, 99], dim=1), dim=1), dense),
        (torch.cat(swapped.chunk(2)), dense.t()),
        (torch.cat(swapped.chunk(2, dim=-1), dim=-1), dense.t()),
        (torch.cat([weight[7:9].detach(), weight[9:500].detach()]), dense[7:500]),
        (torch.stack(weight[:600].chunk(3)), dense[:600].view(3, 200, 700)),
        (torch.cat(parts), dense[100:]),
    ):
        assert isinstance(joined, CodecTensor)
        assert torch.equal(joined.dequantize(), expected)
        assert joined.stored_bytes <= weight.stored_bytes


def test_slices_of_experts_are_joined_again() -> None:
    experts = encode(rand(4, 64, 96))
    dense = experts.dequantize()
    for weight, expected in ((experts, dense), (experts.transpose(1, 2), dense.mT)):
        columns = 1 if weight.transposed else 2
        for dim in (0, columns):
            chunks = weight.chunk(2, dim)
            assert torch.equal(chunks[1].dequantize(), expected.chunk(2, dim)[1])
            assert torch.equal(torch.cat(chunks, dim).dequantize(), expected)
        assert torch.equal(torch.stack(weight.unbind()[1:3]).dequantize(), expected[1:3])
        with pytest.raises(NotImplementedError, match=f"slice of dimension {3 - columns}"):
            weight.chunk(2, 3 - columns)


def test_joined_within_a_compiled_function(weight: CodecTensor) -> None:
    def product(weight: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, torch.cat(weight.chunk(2)))

    x = rand(3, 700)
    run = torch.compile(product, fullgraph=True)
    torch.testing.assert_close(run(weight, x), product(weight, x))


@pytest.mark.feature(VIEWS, "`contiguous()` and `clone()` of a slice keep only its tiles")
def test_a_slice_that_is_copied_holds_its_tiles_only(weight: CodecTensor) -> None:
    half = weight[:500].contiguous()
    assert half.stored_bytes < 0.75 * weight.stored_bytes
    assert torch.equal(half.dequantize(), weight.dequantize()[:500])
    assert torch.equal(half[10:20].dequantize(), weight.dequantize()[10:20])
    wrong = half.with_shape([250, 700], [750, 250, 0, 700])
    with pytest.raises(CodecError, match="is not here: this is a slice"):
        wrong.dequantize()


def test_only_the_tiles_of_a_slice_are_decoded(
    weight: CodecTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchcodec_weights.decoders import cpu

    seen: list[range] = []
    original = cpu._decode_tiles
    monkeypatch.setattr(cpu, "_decode_tiles", lambda *a: (seen.append(a[2]), original(*a))[1])
    first_end = weight.header.blocks[0].end_row
    weight[:first_end].dequantize()
    F.embedding(torch.tensor([0, first_end - 1]), weight)
    assert seen == [range(1), range(1)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: w[::2], "step=2: allowed: 1"),
        (lambda w: w[3:3], "3:3 of a CodecTensor is empty"),
        (lambda w: w[0], "allowed: one expert of a weight of 3 dimensions"),
        (lambda w: w.view(-1, 10), r"view of a CodecTensor.*\.dequantize\(\)"),
        (lambda w: w + 1, r"aten\.add\.Tensor is not implemented.*\.dequantize\(\)"),
        (lambda w: w.sum(), r"aten\.sum.* is not implemented.*\.dequantize\(\)"),
        (lambda w: torch.cat([w, w]), r"cat of .*from_hp\(torch\.cat\(\[w\.dequantize\(\)"),
        (lambda w: torch.cat([w[500:], w[:500]]), "not slices of one weight, next to each other"),
        (lambda w: torch.cat([w[:9], w[9:, :8]]), "shapes that differ in that dimension alone"),
        (lambda w: torch.cat([w[:9], w[9:].dequantize()]), "cat of encoded and dense tensors"),
        (lambda w: torch.cat([w, encode(rand(1000, 700))]), "not slices of one weight"),
        (lambda w: torch.stack([w[:9], w[10:19]]), r"stack of .*from_hp\(torch\.stack"),
        (lambda w: torch.stack([w[:9], w[9:18]], 1), "stack of CodecTensors in dimension 1"),
        (lambda w: w.detach().mul_(2), r"mul_.*decompress_\(model\), merge"),
        (lambda w: F.embedding(torch.tensor([1000]), w), "into a weight of 1000 rows"),
        (lambda w: F.embedding(torch.tensor([0]), w, max_norm=1.0), r"max_norm=1\.0"),
    ],
)
def test_what_is_refused(weight: CodecTensor, call: object, message: str) -> None:
    with pytest.raises((NotImplementedError, IndexError, ValueError), match=message):
        call(weight)  # type: ignore[operator]


@pytest.mark.feature(LAYERS, "`nn.Embedding`", "decodes only the tiles that hold the tokens' rows")
@pytest.mark.parametrize("compiled", [False, True])
def test_embedding(compiled: bool) -> None:
    layer = nn.Embedding(600, 256, padding_idx=3)
    quantize_(layer, codec_weight_only(bits=4, preset="fast"), lambda module, name: True)
    assert isinstance(layer.weight, CodecTensor)
    indices = torch.tensor([[0, 3, 599], [4, 4, 300]])
    run = torch.compile(layer, fullgraph=True) if compiled else layer
    expected = F.embedding(indices, layer.weight.dequantize())
    assert torch.equal(run(indices), expected)
    assert run(indices[:0]).shape == (0, 3, 256)


@pytest.mark.feature(LAYERS, "`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`", "by choice: filter_fn")
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(16, 24, 3, padding=1), (2, 16, 9, 11)),
        (nn.Conv2d(16, 24, (3, 5), stride=2, dilation=2, groups=2), (2, 16, 13, 17)),
        (nn.Conv2d(16, 24, 4, padding="same", bias=False), (2, 16, 9, 11)),
        (nn.Conv1d(32, 24, 5, stride=3, padding=2), (2, 32, 40)),
        (nn.Conv3d(8, 12, 3, padding=1), (1, 8, 5, 6, 7)),
        (nn.Conv2d(32, 32, 3, groups=32), (2, 32, 9, 9)),
        (nn.Conv2d(16, 24, 3, padding=1), (16, 9, 11)),
    ],
)
def test_convolutions(layer: nn.Module, size: tuple[int, ...]) -> None:
    quantize_(layer, codec_weight_only(step=0.05, preset="fast"), lambda module, name: True)
    assert isinstance(layer.weight, CodecTensor)
    x = rand(*size, grad=True)
    ours = layer(x)
    (grad,) = torch.autograd.grad(ours.square().sum(), x)
    decompress_(layer)
    theirs = layer(x)
    (expected,) = torch.autograd.grad(theirs.square().sum(), x)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-3)


class Experts(nn.Module):
    """A mixture of experts as transformers writes it: weights of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(rand(4, 96, 160))
        self.down = nn.Parameter(rand(4, 160, 96))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(torch.relu(torch.bmm(x, self.up)), self.down)


@pytest.mark.feature(LAYERS, "mixtures of experts: weights of three dimensions, `bmm`, `weight[i]`")
@pytest.mark.parametrize("compiled", [False, True])
def test_experts(compiled: bool) -> None:
    experts = Experts()
    config = codec_weight_only(bits=4, preset="fast")
    quantize_(experts, FqnToConfig({"up": config, "down": config}))
    up = experts.up
    assert isinstance(up, CodecTensor)
    assert up.bits_per_weight < 4.2
    dense = up.dequantize()
    assert dense.shape == (4, 96, 160)
    x = rand(4, 5, 96)
    run = torch.compile(experts, fullgraph=True) if compiled else experts
    ours = run(x)
    torch.testing.assert_close(F.linear(x[2], up[2].t()), x[2] @ dense[2], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(x @ up, x @ dense, rtol=1e-4, atol=1e-3)
    assert torch.equal(up.unbind()[3].dequantize(), dense[3])
    assert torch.equal(up[1:3].dequantize(), dense[1:3])
    swapped = up.transpose(1, 2)
    torch.testing.assert_close(
        torch.bmm(rand(4, 2, 160), swapped), rand(4, 2, 160) @ dense.mT, rtol=1e-4, atol=1e-3
    )
    assert "up" in str(compression_report(experts))
    decompress_(experts)
    torch.testing.assert_close(ours, experts(x), rtol=1e-4, atol=1e-2)


@pytest.mark.feature(LAYERS, "embedding tied to the head: encoded once, stays tied")
def test_tied(recwarn: pytest.WarningsRecorder) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(500, 128)
            self.head = nn.Linear(128, 500, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, indices: Tensor) -> Tensor:
            return self.head(self.embed(indices))

    model = Model()
    quantize_(
        model,
        codec_weight_only(bits=4, preset="fast"),
        lambda module, name: isinstance(module, nn.Linear | nn.Embedding),
    )
    assert isinstance(model.head.weight, CodecTensor)
    assert model.head.weight is model.embed.weight
    ours = model(torch.tensor([[1, 2]]))
    decompress_(model)
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(ours, model(torch.tensor([[1, 2]])), rtol=1e-4, atol=1e-4)


def test_a_model_is_converted_in_inference_mode() -> None:
    """Where operators made of others come to the subclass whole."""
    model = nn.Linear(64, 64)
    quantize_(model, codec_weight_only("ectcq", bits=4, preset="fast"))
    x = torch.randn(2, 64)
    expected = model(x)
    with torch.inference_mode():
        assert model.to(torch.bfloat16).weight.dtype == torch.bfloat16
        assert torch.allclose(model.float()(x), expected, atol=0.05)
        with pytest.raises(NotImplementedError, match="view of a CodecTensor"):
            model.weight.reshape(32, 128)
