"""Linear layers on the CPU: the prepared product, and the ways from `F.linear` to it."""

import numpy as np
import pytest
import torch
from test_order import important
from torch import Tensor
from torch.nn import functional as F

from torchcodec_weights import CodecError, CodecTensor, codec_weight_only, third_party
from torchcodec_weights.codecs.common.compiled import LEVELS, best_level
from torchcodec_weights.codecs.ectcq.linear import LinearProduct
from torchcodec_weights.format.dtypes import DTYPE_CODES
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.opened import OpenedMatrix, open_matrix
from torchcodec_weights.pytorch import dispatch, operators

CLOSE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def coded(shape: tuple[int, int], kind: str) -> CodecTensor:
    """A weight with outliers, of several tiles where it is large."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    weight[:: shape[0] // 3 + 1, :: shape[1] // 4 + 1] *= 30
    config = codec_weight_only("ectcq", bits=3, preset="fast")
    if kind == "zero points":
        weight += torch.linspace(-4, 4, shape[0])[:, None]
    if kind == "columns":
        config = config.with_importance(important(weight), 3)
    tensor = CodecTensor.from_hp(weight, config)
    assert (tensor.zero_point is not None) == (kind == "zero points")
    return tensor


def opened(weight: CodecTensor) -> OpenedMatrix:
    return open_matrix(*weight.coded)


@pytest.mark.parametrize("kind", ["rows", "zero points", "columns"])
@pytest.mark.parametrize("shape", [(64, 64), (700, 256), (90, 77), (40, 1024)], ids=str)
@pytest.mark.parametrize("level", range(best_level() + 1), ids=lambda level: LEVELS[level])
def test_products_of_windows(kind: str, shape: tuple[int, int], level: int) -> None:
    weight = coded(shape, kind)
    matrix, dense = opened(weight), weight.dequantize().double()
    rows, cols = shape
    for window in (
        Window(0, rows, 0, cols),
        Window(rows // 2, rows - rows // 2, 3, cols - 5),
        Window(1, 1, cols - 1, 1),
    ):
        tiles = matrix.tiles(window.first_row, window.first_row + window.rows)
        product = LinearProduct(matrix.stored(), tiles, window, level)
        part = dense[window.first_row :][: window.rows, window.first_col :][:, : window.cols]
        for tokens, threads, dtype in (
            (1, 1, torch.float32), (1, 2, torch.bfloat16), (5, 2, torch.float16),
            (16, 1, torch.float32), (2, 3, torch.bfloat16),
        ):  # fmt: skip
            x = torch.randn(tokens, window.cols).to(dtype)
            bias = None if tokens == 2 else torch.randn(window.rows).to(dtype)
            y = torch.full((tokens, window.rows), torch.nan, dtype=dtype)
            address = None if bias is None else bias.data_ptr()
            code = DTYPE_CODES[str(dtype).removeprefix("torch.")]
            product(x.data_ptr(), code, tokens, address, y.data_ptr(), threads)
            expected = x.double() @ part.T
            if bias is not None:
                expected += bias.double()
            size = (x.double().abs() @ part.abs().T).max() / cols**0.5 + expected.abs().max()
            assert (y.double() - expected).abs().max() <= CLOSE[dtype] * size


@pytest.mark.parametrize("level", range(best_level() + 1), ids=lambda level: LEVELS[level])
def test_few_tiles_are_divided(level: int) -> None:
    """The same for any number of threads, and what whole tiles give but for the order of sums."""
    weight = coded((300, 608), "zero points")
    matrix = opened(weight)
    window = Window(0, 300, 0, 608)
    product = LinearProduct(matrix.stored(), matrix.tiles(0, 300), window, level)
    assert (product.parts > 1) == (LEVELS[level] not in ("scalar", "vector"))
    for tokens in (1, 2):
        x = torch.randn(tokens, 608, generator=torch.Generator().manual_seed(0))
        results = []
        for threads in (1, 2, 7):
            y = torch.full((tokens, 300), torch.nan)
            product(x.data_ptr(), DTYPE_CODES["float32"], tokens, None, y.data_ptr(), threads)
            results.append(y)
        assert all(torch.equal(y, results[0]) for y in results)
        expected = F.linear(x, weight.dequantize())
        assert (results[0] - expected).norm() < CLOSE[torch.float32] * expected.norm()


def test_a_damaged_tile_is_named() -> None:
    weight = coded((700, 256), "rows")
    matrix = opened(weight)
    assert len(matrix.header.blocks) == 3
    weight.qdata[int(matrix.header.offsets[1]) + 200] ^= 1
    with pytest.raises(CodecError, match="tile 1 is corrupt: checksum"):
        F.linear(torch.randn(1, 256), weight)


def test_a_product_follows_its_tensors() -> None:
    """What was prepared points into tensors, which may be written to or replaced."""
    weight, other = coded((90, 64), "rows"), coded((90, 64), "rows")
    x = torch.randn(2, 64)
    expected = F.linear(x, weight)
    weight.qdata.copy_(weight.qdata.clone())
    assert torch.equal(F.linear(x, weight), expected)
    weight.scale = weight.scale.clone()
    assert torch.equal(F.linear(x, weight), expected)
    other.qdata = other.qdata.clone()  # that of an encoder has memory of NumPy
    F.linear(x, other)
    other.qdata.untyped_storage().resize_(0)
    with pytest.raises(CodecError, match="memory of a bitstream was released"):
        F.linear(x, other)


def test_many_windows_are_not_all_kept() -> None:
    weight = coded((90, 64), "rows")
    dense, x = weight.dequantize(), torch.randn(1, 64)
    for row in range(20):
        part = F.linear(x, weight[row : row + 3])
        assert torch.allclose(part, x @ dense[row : row + 3].T, atol=1e-4)
    assert len(opened(weight)._products) <= 8


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ways that products take."""
    taken: list[str] = []

    def watched(name: str) -> None:
        original = getattr(operators, name)

        def call(*args: object) -> Tensor:
            taken.append(name)
            result: Tensor = original(*args)
            return result

        monkeypatch.setattr(operators, name, call)

    for name in ("linear", "linear_inference", "linear_unwatched"):
        watched(name)
    return taken


def test_a_gradient_takes_the_operator_that_has_one(calls: list[str]) -> None:
    weight = coded((90, 64), "rows")
    x = torch.randn(2, 64, requires_grad=True)
    F.linear(x, weight).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad[0], weight.dequantize().sum(0), atol=1e-3)
    bias = torch.zeros(90, requires_grad=True)
    F.linear(x.detach(), weight, bias).sum().backward()
    assert bias.grad is not None
    assert set(calls) == {"linear"}
    calls.clear()
    with torch.no_grad():
        F.linear(x, weight, bias)
    with torch.inference_mode():
        F.linear(x, weight, bias)
    F.linear(x.detach(), weight)
    assert calls == ["linear_unwatched"] * 3


def test_what_watches_operators_sees_them(calls: list[str]) -> None:
    weight, x = coded((90, 64), "rows"), torch.randn(3, 64)
    expected = F.linear(x, weight)
    with torch.profiler.profile() as profile:
        F.linear(x, weight)
    names = {event.key for event in profile.key_averages()}
    assert "torchcodec_weights::linear_inference" in names
    mapped = torch.func.vmap(lambda row: F.linear(row, weight))(x)
    assert torch.allclose(mapped, expected, rtol=1e-5, atol=1e-5)
    assert calls == ["linear_unwatched", "linear_inference", "linear_inference"]


def test_no_tokens() -> None:
    weight = coded((90, 64), "rows")
    assert F.linear(torch.empty(0, 64), weight).shape == (0, 90)
    assert F.linear(torch.empty(2, 0, 64), weight, torch.zeros(90)).shape == (2, 0, 90)
    assert F.linear(torch.randn(64), weight).shape == (90,)


def test_activations_that_are_not_in_memory(calls: list[str]) -> None:
    """Views of negated numbers and zeros without memory, both of PyTorch's own functions."""
    weight = coded((90, 64), "rows")
    dense = weight.dequantize()
    negated = torch.randn(3, 64, dtype=torch.complex64).conj().imag
    bias = torch.randn(90, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    assert torch.allclose(F.linear(negated, weight), F.linear(negated, dense), atol=1e-4)
    x = torch.randn(3, 64)
    assert torch.allclose(F.linear(x, weight, bias), F.linear(x, dense, bias), atol=1e-4)
    assert calls == ["linear_inference"] * 2
    zeros = torch._efficientzerotensor(3, 64)
    assert third_party.is_zeros_without_memory(zeros)
    assert not third_party.is_zeros_without_memory(x)
    assert dispatch._linear_for(zeros, None, "cpu") is operators.linear_inference


def test_activations_of_any_strides() -> None:
    weight = coded((90, 64), "rows")
    dense = weight.dequantize()
    x = torch.randn(64, 6).T[::2]
    bias = torch.randn(180)[::2]
    assert torch.allclose(F.linear(x, weight, bias), F.linear(x, dense, bias), atol=1e-4)
    assert np.isclose(float(F.linear(x, weight)[1, 4]), float(x[1] @ dense[4]), atol=1e-4)
