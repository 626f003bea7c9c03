"""Saving and loading: torch.save, safetensors, distributed checkpoints, state dicts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from torchcodec_weights import (
    CodecError,
    CodecTensor,
    codec_weight_only,
    load_file,
    quantize_,
    save_file,
)
from torchcodec_weights.format.container import VERSION, crc32c
from torchcodec_weights.format.safetensors import parse_header

GROUP = "Saving and loading"
X = torch.randn(3, 128, generator=torch.Generator().manual_seed(5))


def model(*, bits: float | None = 5, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
    if bits:
        quantize_(layers, codec_weight_only(bits=bits, preset="fast"))
    return layers


def same_bitstreams(a: nn.Module, b: nn.Module) -> None:
    for name, weight in a.state_dict().items():
        other = b.state_dict()[name]
        assert type(weight) is type(other)
        if isinstance(weight, CodecTensor):
            assert torch.equal(weight.qdata, other.qdata)
        assert torch.equal(weight, other)


def in_fresh_process(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.feature(
    GROUP,
    "`torch.save`, `torch.load(weights_only=True)`, `mmap=True`",
    "a fresh process that only imports the package",
)
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_save(tmp_path: Path, mmap: bool) -> None:
    quantized = model()
    path = tmp_path / "model.pt"
    torch.save(quantized.state_dict(), path)
    stored = sum(w.stored_bytes for w in (quantized[0].weight, quantized[2].weight))
    assert path.stat().st_size < stored + 4 * (256 + 128) + 8000
    code = """
import sys, torch, torchcodec_weights
state = torch.load(sys.argv[1], weights_only=True, mmap=sys.argv[2] == "True")
model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128))
model.load_state_dict(state, assign=True)
x = torch.randn(3, 128, generator=torch.Generator().manual_seed(5))
with torch.no_grad():
    print(model(x).double().sum().item())
"""
    with torch.no_grad():
        expected = quantized(X).double().sum().item()
    assert float(in_fresh_process(code, path, mmap)) == expected


@pytest.mark.feature(GROUP, "safetensors: `save_file`, `load_file`", "tied weights are stored once")
def test_safetensors(tmp_path: Path) -> None:
    quantized = model()
    state = dict(quantized.state_dict())
    state["tied"] = state["0.weight"]
    state["also"] = state["2.bias"]
    path = tmp_path / "model.safetensors"
    save_file(state, path, {"note": "kept"})
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "no temporary file stays"
    stored = sum(w.stored_bytes for w in (quantized[0].weight, quantized[2].weight))
    assert path.stat().st_size < stored + 4 * (256 + 128) + 4000
    loaded = load_file(path)
    assert loaded["tied"] is loaded["0.weight"]
    assert loaded["also"] is loaded["2.bias"]
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["note"] == "kept"
    again = model(bits=None)
    again.load_state_dict({name: loaded[name] for name in quantized.state_dict()}, assign=True)
    same_bitstreams(quantized, again)


def test_a_file_is_the_same_at_every_run(tmp_path: Path) -> None:
    """safetensors would write the table of strings in the order of a hash map."""
    state = {f"{index}.{name}": w for index in range(3) for name, w in model().state_dict().items()}
    plain = {
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3, dtype=torch.int32),
        "odd": torch.ones(5, dtype=torch.bool),
        "part": torch.arange(12).reshape(3, 4).t(),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "complex": torch.ones(2, dtype=torch.complex64).conj(),
    }
    files = []
    for index in range(3):
        save_file({**state, **plain}, tmp_path / str(index), {"b": "1", "a": "2", "ü": "3"})
        files.append((tmp_path / str(index)).read_bytes())
    assert len(set(files)) == 1
    # As safetensors reads it: aligned, mapped, and none missing.
    with safetensors.safe_open(tmp_path / "0", "pt") as file:
        for name, tensor in plain.items():
            assert torch.equal(file.get_tensor(name), tensor)
        assert file.metadata()["ü"] == "3"
    header = parse_header(files[0][8 : 8 + int.from_bytes(files[0][:8], "little")], "it")
    sizes = {"F64": 8, "C64": 8, "F32": 4, "I32": 4, "BF16": 2}
    for stored in header.tensors.values():
        assert stored.start % sizes.get(stored.dtype, 1) == 0
    with pytest.raises(ValueError, match=r"'x' is torch\.complex128: allowed: torch\.float64"):
        save_file({"x": torch.ones(2, dtype=torch.complex128)}, tmp_path / "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "cannot|can be read"),
        (b"[]", "can be read"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "4 bytes for F32"),
        (b'{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}', "'F33'"),
        (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}', "does not follow"),
        (b'{"a": {"dtype": "U8", "shape": [-1], "data_offsets": [1, 0]}}', r"\(-1,\)"),
        (b'{"a": 3}', "can be read"),
        (b'{"__metadata__": {"a": 3}}', "table of strings"),
    ],
)
def test_headers_that_lie(text: bytes, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        parse_header(text, "it")


def test_safetensors_in_a_fresh_process(tmp_path: Path) -> None:
    quantized = model()
    save_file(quantized.state_dict(), tmp_path / "m.safetensors")
    code = """
import sys, torchcodec_weights
print(torchcodec_weights.load_file(sys.argv[1])["0.weight"].dequantize().double().sum().item())
"""
    expected = quantized[0].weight.dequantize().double().sum().item()
    assert float(in_fresh_process(code, tmp_path / "m.safetensors")) == expected


def test_safetensors_without_codec_tensors_loads_as_it_is(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "b.c": torch.zeros(2, 2)}
    safetensors.torch.save_file(tensors, tmp_path / "plain.safetensors")
    loaded = load_file(tmp_path / "plain.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(2)}, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="the name 'tensor_names' would be used twice"):
        save_file({"tensor_names": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="the key 'a' is used by the file itself"):
        save_file({"a": torch.zeros(2)}, path, {"a": "mine"})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def _changed(weight: CodecTensor, position: int, new: bytes) -> CodecTensor:
    """A weight whose header says something else, under a right checksum."""
    data = bytearray(weight.qdata.numpy().tobytes())
    data[position : position + len(new)] = new
    size = int.from_bytes(data[8:12], "little")
    data[size - 4 : size] = crc32c(bytes(data[: size - 4])).to_bytes(4, "little")
    changed = weight.clone()
    changed.qdata = torch.frombuffer(data, dtype=torch.uint8)
    return changed


@pytest.mark.feature(
    GROUP, "a newer format, a missing codec, damage: told at load", "before anything is decoded"
)
@pytest.mark.parametrize("how", ["torch.load", "load_file"])
@pytest.mark.parametrize(
    ("position", "new", "message"),
    [
        (4, (VERSION + 1).to_bytes(2, "little"), rf"format {VERSION + 1} is newer.*upgrade"),
        (52, b"ectcX", "codec 'ectcX', which this version.*upgrade it, or install the package"),
        (52, b"\xff", "is corrupt|does not have"),
    ],
)
def test_what_cannot_be_loaded(
    tmp_path: Path, how: str, position: int, new: bytes, message: str
) -> None:
    weight = model()[0].weight.detach()
    assert weight.qdata.numpy().tobytes()[52:57] == b"ectcq"
    changed = _changed(weight, position, new)
    path = tmp_path / "file"
    if how == "torch.load":
        torch.save({"0.weight": changed}, path)
        with pytest.raises(CodecError, match=message):
            torch.load(path, weights_only=True)
    else:
        save_file({"0.weight": changed}, path)
        with pytest.raises(CodecError, match=rf"0\.weight: .*({message})"):
            load_file(path)


def test_a_codec_whose_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchcodec_weights.codecs.video import ffmpeg

    weight = CodecTensor.from_hp(torch.randn(128, 128), codec_weight_only("h264", bits=4))
    path = tmp_path / "m.safetensors"
    save_file({"0.weight": weight}, path)
    monkeypatch.setattr(ffmpeg, "pyav", lambda: None)
    with pytest.raises(CodecError, match=r"0\.weight: codec 'h264' is not available.*pip install"):
        load_file(path)


@pytest.mark.feature(GROUP, "distributed checkpoint", "into the same weights, or to a dense model")
def test_distributed_checkpoint(tmp_path: Path) -> None:
    quantized = model()
    dcp.save({"model": quantized.state_dict()}, checkpoint_id=tmp_path / "dcp")
    same = model()
    with torch.no_grad():
        same[0].bias.zero_()
    state = {"model": same.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    same.load_state_dict(state["model"])
    same_bitstreams(quantized, same)

    dense = model(bits=None, seed=3)
    state = {"model": dense.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    with torch.no_grad():
        torch.testing.assert_close(dense(X), quantized(X))

    other = model(bits=4)
    state = {"model": other.state_dict()}
    with pytest.raises(CheckpointException) as raised:
        dcp.load(state, checkpoint_id=tmp_path / "dcp")
    ((error, _),) = raised.value.failures.values()
    assert "bitstreams cannot be resized in place; load with assign=True" in str(error)

    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "model.pt")
    plain = torch.load(tmp_path / "model.pt", weights_only=True)["model"]
    assert torch.equal(plain["0.weight"], quantized[0].weight.dequantize())


STATES = {
    "dense": lambda: model(bits=None, seed=3),
    "quantized, same lengths": lambda: model(),
    "quantized, other lengths": lambda: model(bits=4),
    "meta": lambda: model(bits=None).to("meta"),
    "quantized, on meta": lambda: model().to("meta"),
}


@pytest.mark.feature(
    GROUP,
    "`load_state_dict` into dense, quantized and meta models, `assign` both ways",
    "works, or says what to do",
)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("into", STATES)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_load_state_dict(into: str, assign: bool, quantized: bool) -> None:
    source = model() if quantized else model(bits=None)
    target = STATES[into]()
    was_dense = into in ("dense", "meta")
    if assign:
        target.load_state_dict(source.state_dict(), assign=True)
        same_bitstreams(source, target)
        assert not target[0].weight.requires_grad or not quantized
    elif "meta" in into and (quantized or into == "meta"):
        target.load_state_dict(source.state_dict())  # PyTorch's own: warns and does nothing
        assert target[0].weight.device.type == "meta"
        return
    elif was_dense or (quantized and into == "quantized, same lengths"):
        target.load_state_dict(source.state_dict())
    else:
        message = "assign=True" if quantized else "copy_ of a dense tensor into a CodecTensor"
        with pytest.raises(RuntimeError, match=message):
            target.load_state_dict(source.state_dict())
        return
    with torch.no_grad():
        torch.testing.assert_close(target(X), source(X))


def test_a_checkpoint_names_its_parts_as_torchao_does(tmp_path: Path) -> None:
    """transformers finds the parts by these names."""
    save_file(model().state_dict(), tmp_path / "m.safetensors")
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
        keys, table = set(file.keys()), file.metadata()
    assert {"0._weight_qdata", "0._weight_scale", "0._weight_act_pre_scale", "0.bias"} <= keys
    assert json.loads(table["0.weight"])["_type"] == "CodecTensor"
    assert json.loads(table["0.bias"]) == {"_type": "Tensor"}
