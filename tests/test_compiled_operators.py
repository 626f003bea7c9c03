"""`linear_inference` in compiled code: what it takes over from Python, and what it gives back."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import fastest
from torch import Tensor, nn

from torchcodec_weights import (
    CodecError,
    CodecTensor,
    codec_weight_only,
    decoded_cache,
    quantize_,
    resident,
)
from torchcodec_weights.codecs.common import compiled
from torchcodec_weights.decoders import resident as resident_weights
from torchcodec_weights.decoders.cache import CACHE
from torchcodec_weights.decoders.int8 import Int8Weight
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.opened import OpenedMatrix, open_matrix
from torchcodec_weights.pytorch import operators


def coded_linear(rows: int = 70, cols: int = 64, codec: str = "ectcq") -> nn.Linear:
    layer = nn.Linear(cols, rows)
    config = codec_weight_only(codec, bits=4, preset=fastest(codec))
    quantize_(layer, config, lambda module, name: isinstance(module, nn.Linear))
    return layer.requires_grad_(False)


def product(layer: nn.Linear, x: Tensor) -> Tensor:
    weight: CodecTensor = layer.weight  # type: ignore[assignment]
    window = weight.resolved_window
    result: Tensor = operators.linear_inference(x, *weight.coded, layer.bias, window, False)
    return result


def by_python(layer: nn.Linear, x: Tensor) -> Tensor:
    weight: CodecTensor = layer.weight  # type: ignore[assignment]
    window = weight.resolved_window
    return operators.linear_kernel(x, *weight.coded, layer.bias, window, False)


def through_dispatcher(layer: nn.Linear, x: Tensor) -> Tensor:
    """As AOTInductor calls it, not as Python does."""
    weight: CodecTensor = layer.weight  # type: ignore[assignment]
    call = operators.linear_inference._op.args[0]
    result: Tensor = call(x, *weight.coded, layer.bias, weight.resolved_window, False)
    return result


def opened(layer: nn.Linear) -> OpenedMatrix:
    weight: CodecTensor = layer.weight  # type: ignore[assignment]
    return open_matrix(*weight.coded)


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> list[OpenedMatrix]:
    """Grows by the matrix of each product that Python computes."""
    seen: list[OpenedMatrix] = []
    original = operators._hand_over

    def hand_over(matrix: OpenedMatrix, window: Window) -> None:
        seen.append(matrix)
        original(matrix, window)

    monkeypatch.setattr(operators, "_hand_over", hand_over)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_takes_over_from_the_third_use_on(
    dtype: torch.dtype, in_python: list[OpenedMatrix]
) -> None:
    layer = coded_linear().to(dtype)
    for shape in ((64,), (1, 64), (2, 3, 64), (16, 64)):
        x = torch.randn(shape, dtype=dtype)
        assert torch.equal(product(layer, x), by_python(layer, x))
    assert len(in_python) == 2


def test_gives_back_what_it_does_not_multiply(in_python: list[OpenedMatrix]) -> None:
    layer = coded_linear()
    x = torch.randn(17, 64)
    for given in (x[:1], x[:1], x, x[:0], torch.randn(64, 3).T):
        assert torch.equal(product(layer, given), by_python(layer, given))
    assert len(in_python) == 5


def test_follows_what_is_written(in_python: list[OpenedMatrix]) -> None:
    layer, x = coded_linear(), torch.randn(1, 64)
    for _ in range(3):
        before = product(layer, x)
    assert len(in_python) == 2
    weight: CodecTensor = layer.weight  # type: ignore[assignment]
    other = CodecTensor.from_hp(2 * weight.dequantize(), codec_weight_only(bits=2))  # shorter
    for written, new in zip(weight.coded, other.coded, strict=True):
        if written is not None and new is not None:
            written.resize_(new.shape).copy_(new)
    after = product(layer, x)
    assert len(in_python) == 3
    assert torch.equal(after, by_python(layer, x))
    assert not torch.allclose(after, before, atol=0.1)


def test_leaves_it_to_what_keeps_decoded_weights(in_python: list[OpenedMatrix]) -> None:
    layer, x = coded_linear(), torch.randn(1, 64)
    for _ in range(3):
        plain = product(layer, x)
    assert len(in_python) == 2
    with decoded_cache("1 MB"):
        CACHE.get(opened(layer), Window(0, 70, 0, 64), x.dtype, x.device).zero_()
        for _ in range(3):
            assert torch.equal(product(layer, x)[0], layer.bias)
            assert torch.equal(through_dispatcher(layer, x)[0], layer.bias)
    assert torch.equal(product(layer, x), plain)
    resident(layer, "int8")
    for _ in range(3):
        levels = product(layer, x)
        assert torch.equal(through_dispatcher(layer, x), levels)
    assert torch.equal(levels, by_python(layer, x))
    assert not torch.equal(levels, plain)
    resident(layer, "bits")
    for _ in range(3):
        assert torch.equal(product(layer, x), plain)


def test_damage_is_the_error_that_python_raises() -> None:
    layer, x = coded_linear(), torch.randn(1, 64)
    for _ in range(3):
        product(layer, x)
    weight: CodecTensor = layer.weight  # type: ignore[assignment]
    weight.qdata[-3] ^= 1
    with pytest.raises(CodecError) as expected:
        by_python(layer, x)
    for _ in range(3):
        with pytest.raises(CodecError) as raised:
            product(layer, x)
        assert str(raised.value) == str(expected.value)
    with pytest.raises(RuntimeError) as error:
        through_dispatcher(layer, x)
    assert str(error.value) == f"torchcodec_weights: {expected.value}"
    weight.qdata[-3] ^= 1
    weight.qdata[60] ^= 1
    with pytest.raises(CodecError, match="header is corrupt"):
        product(layer, x)


def test_forgets_what_is_freed() -> None:
    gc.collect()
    watched = set(operators._watched)
    layer, x = coded_linear(), torch.randn(1, 64)
    for _ in range(3):
        product(layer, x)
    assert len(operators._watched) == len(watched) + 1
    del layer
    gc.collect()
    assert operators._watched <= watched


@pytest.mark.parametrize("codec", ["ectcq", "h264"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_takes_over_int8_levels(
    codec: str, dtype: torch.dtype, in_python: list[OpenedMatrix]
) -> None:
    layer = coded_linear(codec=codec).to(dtype)
    resident(layer, "int8")
    for shape in ((64,), (1, 64), (2, 3, 64), (16, 64)):
        x = torch.randn(shape, dtype=dtype)
        expected = by_python(layer, x)
        for call in (product, through_dispatcher):
            assert torch.equal(call(layer, x), expected)
        assert torch.equal(layer(x), expected)
    assert len(in_python) == 1
    rows = slice(3, 40)
    weight, bias = layer.weight[rows], layer.bias[rows]
    for _ in range(3):
        assert torch.equal(F.linear(x, weight, bias), expected[:, rows])
    assert len(in_python) == 2


def test_frees_int8_levels() -> None:
    layer, x = coded_linear(), torch.randn(1, 64)
    for change in (lambda: resident(layer, "bits"), lambda: delattr(layer, "weight")):
        resident(layer, "int8")
        kept = resident_weights.find(opened(layer), Window(0, 70, 0, 64), x.device)
        assert isinstance(kept, Int8Weight)
        alone = kept.levels._use_count()
        product(layer, x)
        assert kept.levels._use_count() == alone + 1
        change()
        gc.collect()
        assert kept.levels._use_count() == alone


WITHOUT = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
library.torchcodec_weights_register.restype = ctypes.c_char_p
assert library.torchcodec_weights_register() is None
ops = torch.ops.torchcodec_weights
for coded, window, x, bias, indices, products, rows in torch.load(sys.argv[2]):
    for _ in range(2):
        for tokens, expected in products.items():
            found = ops.linear_inference(x[:tokens], *coded, bias, window, False)
            if tokens <= 16:
                assert torch.equal(found, expected)
            else:  # sums of a matrix product, of columns beside the window too in Python
                tolerance = 0.2 if x.dtype == torch.bfloat16 else 1e-3
                torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
            assert torch.equal(found, ops.linear(x[:tokens], *coded, bias, window, False))
        assert torch.equal(ops.embedding(indices, *coded, window, x.dtype), rows)
    damaged = coded[0].clone()
    damaged[-3] ^= 1
    for call in (
        lambda: ops.linear_inference(x[:1], damaged, *coded[1:], bias, window, False),
        lambda: ops.linear_inference(x, damaged, *coded[1:], bias, window, False),
        lambda: ops.linear_inference(x, coded[0][:-1], *coded[1:], bias, window, False),
        lambda: ops.linear_inference(x, *coded, bias, window, True),
        lambda: ops.linear_inference(x[:, 1:], *coded, bias, window, False),
        lambda: ops.embedding(indices + 10**6, *coded, window, x.dtype),
    ):
        try:
            call()
        except RuntimeError as error:
            print(error)
        else:
            raise AssertionError("no error")
assert "torchcodec_weights" not in sys.modules
"""


def test_without_the_package(tmp_path: Path) -> None:
    """The operators of a process that does not import it, as those of a program without Python."""
    cases = []
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        dense = torch.randn(700, 96, generator=generator) + torch.arange(700)[:, None] % 5
        weight = CodecTensor.from_hp(dense.to(dtype), codec_weight_only(bits=4, preset="fast"))
        qdata, scale, zero_point, act_pre_scale = weight.coded
        coded = qdata, scale, zero_point, act_pre_scale
        for window in ([0, 700, 0, 96], [100, 333, 7, 64]):
            part = weight.dequantize()[window[0] :][: window[1], window[2] :][:, : window[3]]
            x = torch.randn(40, window[3], generator=generator).to(dtype)
            bias = torch.randn(window[1], generator=generator).to(dtype)
            indices = torch.randint(0, window[1], (3, 5), generator=generator)
            products = {
                tokens: operators.linear_kernel(x[:tokens], *coded, bias, window, False)
                for tokens in (1, 16, 17, 40)
            }
            cases.append((weight.coded, window, x, bias, indices, products, part[indices]))
    torch.save(cases, tmp_path / "cases.pt")
    (tmp_path / "program.py").write_text(WITHOUT)
    command = [
        sys.executable,
        "-P",
        tmp_path / "program.py",
        compiled.LIBRARY,
        tmp_path / "cases.pt",
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    messages = run.stdout.splitlines()
    assert any("checksum (CRC-32C) does not match" in line for line in messages)
    assert any("not as long as its header says" in line for line in messages)
