"""Moves: devices, dtypes, processes, and accelerate's offload."""

import copy
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import cpu_offload, disk_offload
from torch import Tensor, nn
from torchao.utils import get_model_size_in_bytes

from torchcodec_weights import CodecTensor, codec_weight_only, quantize_

GROUP = "Moves"
X = torch.randn(3, 128, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).eval()
    quantize_(layers, codec_weight_only(bits=5, preset="fast"))
    return layers.requires_grad_(False)


@pytest.mark.feature(
    GROUP, "`.to(dtype)`, `.half()`, `.bfloat16()`, `.float()`, `.double()` refused"
)
def test_dtypes(model: nn.Sequential) -> None:
    expected = model(X)
    for dtype, move in ((torch.float16, "half"), (torch.bfloat16, "bfloat16")):
        moved = getattr(copy.deepcopy(model), move)()
        assert moved[0].weight.dtype == dtype
        assert moved[0].weight.qdata.dtype == torch.uint8
        got = moved(X.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)
        assert torch.equal(moved.float()[0].weight.qdata, model[0].weight.qdata)
        torch.testing.assert_close(
            moved[0].weight.dequantize(), model[0].weight.dequantize(), rtol=0, atol=0
        )
    with pytest.raises(ValueError, match=r"dtype=torch\.float64: a CodecTensor can be"):
        model.double()


@pytest.mark.feature(GROUP, "`.cpu()`, `.to('meta')`, `to_empty`, `deepcopy`, `swap_tensors`")
def test_devices(model: nn.Sequential) -> None:
    expected = model(X)
    assert torch.equal(model.cpu()(X), expected)
    meta = copy.deepcopy(model).to("meta")
    assert meta[0].weight.qdata.device.type == "meta"
    assert meta(X.to("meta")).shape == (3, 128)
    back = meta.to_empty(device="cpu")
    back.load_state_dict(model.state_dict())
    assert torch.equal(back(X), expected)
    other = nn.Linear(128, 256)
    quantize_(other, codec_weight_only(bits=4, preset="fast"), lambda module, name: True)
    a, b = model[0].weight.dequantize(), other.weight.dequantize()
    torch.utils.swap_tensors(model[0].weight, other.weight)
    assert torch.equal(model[0].weight.dequantize(), b)
    assert torch.equal(other.weight.dequantize(), a)


@pytest.mark.feature(GROUP, "models and weights made and used in `inference_mode`")
def test_inference_mode(model: nn.Sequential) -> None:
    expected = model(X)
    with torch.inference_mode():
        copied = copy.deepcopy(model)
        assert torch.equal(copied(X), expected)
        copied[0].weight.qdata[-3] ^= 1  # such tensors do not count their changes
        with pytest.raises(RuntimeError, match="corrupt"):
            copied(X)
    assert torch.equal(model(X), expected)


def test_what_changes_in_place_is_read_again(model: nn.Sequential) -> None:
    before = model(X)
    other = nn.Linear(128, 256)
    quantize_(other, codec_weight_only(bits=5, preset="fast"), lambda module, name: True)
    weight = model[0].weight
    weight.qdata = weight.qdata.clone()
    length = other.weight.qdata.numel()
    weight.qdata.resize_(length)
    weight.qdata.copy_(other.weight.qdata)
    weight.scale.copy_(other.weight.scale)
    weight.act_pre_scale.copy_(other.weight.act_pre_scale)
    assert torch.equal(weight.dequantize(), other.weight.dequantize())
    assert not torch.equal(model(X), before)
    weight.qdata[length // 2] ^= 255
    with pytest.raises(RuntimeError, match="corrupt"):
        model(X)


def test_resized_in_place_is_an_error_not_a_crash(model: nn.Sequential) -> None:
    model[0].weight.qdata = model[0].weight.qdata.clone()
    model(X)
    assert "codec='ectcq'" in repr(model[0].weight), "to look at a weight must not pin its memory"
    model[0].weight.qdata.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory of a bitstream was released"):
        model(X)


@pytest.mark.feature(GROUP, "`pin_memory`, `is_pinned`", "pinning itself needs a GPU")
def test_pinned(model: nn.Sequential) -> None:
    weight = model[0].weight.data
    assert not weight.is_pinned()
    if torch.cuda.is_available():
        assert weight.pin_memory().is_pinned()


def _product(weight: CodecTensor, x: Tensor, answers: "mp.Queue[list[list[float]]]") -> None:
    answers.put(torch.nn.functional.linear(x, weight).tolist())


@pytest.mark.feature(GROUP, "`share_memory_`, a model sent to another process")
def test_share_memory(model: nn.Sequential) -> None:
    weight = model[0].weight.data
    assert not weight.is_shared()
    model.share_memory()
    assert model[0].weight.is_shared()
    context = mp.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_product, args=(model[0].weight.data, X, answers))
    process.start()
    answer = torch.tensor(answers.get(timeout=120))
    process.join()
    torch.testing.assert_close(answer, torch.nn.functional.linear(X, model[0].weight))


@pytest.mark.feature(
    GROUP, "accelerate: CPU and disk offload", "disk: of a state dict loaded with `mmap=True`"
)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offload(model: nn.Sequential, where: str, tmp_path: Path) -> None:
    expected = model(X)
    state = None
    if where == "disk":
        with pytest.raises(NotImplementedError, match=r"torch\.load\(file, mmap=True\)"):
            disk_offload(copy.deepcopy(model), tmp_path, execution_device=torch.device("cpu"))
        torch.save(model.state_dict(), tmp_path / "model.pt")
        state = torch.load(tmp_path / "model.pt", mmap=True)
    cpu_offload(model, execution_device=torch.device("cpu"), state_dict=state)
    assert model[0].weight.device.type == "meta"
    for _ in range(2):
        assert torch.equal(model(X), expected)
        assert model[0].weight.device.type == "meta"


@pytest.mark.feature(GROUP, "`get_model_size_in_bytes`", "what is stored")
def test_model_size(model: nn.Sequential) -> None:
    stored = sum(model[i].weight.stored_bytes + model[i].bias.nbytes for i in (0, 2))
    assert get_model_size_in_bytes(model) == stored
