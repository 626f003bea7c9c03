"""Files that lie, under checksums that are right: refused with the weight's name, harming nothing.

What payloads can do to the decoders of pictures is in test_hostile_pictures.py, what bytes can do
to compiled decoders in test_sanitizer.py, and tests/fuzz.py looks for more.
"""

import io
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import tiny_llama
from hostile import NAME, Parts, packed, parts_of, stored, weight_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from torchcodec_weights import (
    CodecError,
    CodecTensor,
    allowed_codecs,
    codec_weight_only,
    load_file,
    max_expansion,
    quantize_,
    save_file,
)
from torchcodec_weights.cli import main
from torchcodec_weights.format.container import crc32c, parse_header
from torchcodec_weights.models.checkpoint import load_folder, load_metadata
from torchcodec_weights.models.huggingface import save_compressed

X = torch.ones(1, 64)


@pytest.fixture(scope="module", params=["ectcq", "lossless", "h264"])
def weight(request: pytest.FixtureRequest) -> CodecTensor:
    """A weight of 96 x 64, of each way to decode."""
    values = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    values += torch.arange(96)[:, None]  # for a zero_point
    config = codec_weight_only(request.param, None if request.param == "lossless" else 6)
    return CodecTensor.from_hp(values, config)


def lie(weight: CodecTensor, change: Callable[[Parts], None]) -> CodecTensor:
    parts = parts_of(weight)
    change(parts)
    return weight_of(parts)


def changed(**fields: Any) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        for name, value in fields.items():
            setattr(parts, name, value)

    return change


def said(**attributes: Any) -> Callable[[Parts], None]:
    return lambda parts: parts.attributes.update(attributes)


def short_zero_point(parts: Parts) -> None:
    parts.zero_point = np.zeros(8, np.float32)


def integer_zero_point(parts: Parts) -> None:
    parts.zero_point = np.zeros(parts.rows, np.int32)


def empty_scales(parts: Parts) -> None:
    parts.scale = np.zeros((parts.rows, 0), np.uint8)


def long_scales(parts: Parts) -> None:
    parts.act_pre_scale = np.full(parts.cols + 1, 127, np.uint8)


def no_scales(parts: Parts) -> None:
    parts.scale = np.zeros(0, np.uint8)


def wide_scales(parts: Parts) -> None:
    parts.scale = np.full(parts.rows, 127, np.int64)


def one_tile(parts: Parts) -> None:
    parts.tiles = parts.tiles[:1]
    parts.scale = parts.act_pre_scale = np.full(1, 127, np.uint8)
    parts.zero_point = None
    parts.attributes["window"] = [0, 64, 0, 64]
    parts.attributes["logical_shape"] = [64, 64]


def bomb(parts: Parts) -> None:
    """A matrix of 8 GB behind a window of 64 x 64, in some 200 bytes."""
    one_tile(parts)
    parts.tiles = [(b"\0" * 100, b"", 1.0)]
    parts.rows = parts.cols = 46_340


def wrapping_tile(parts: Parts) -> None:
    """4 · rows · cols is 2^64."""
    one_tile(parts)
    parts.rows = parts.cols = 2**31


def wrapping_rows(parts: Parts) -> None:
    one_tile(parts)
    parts.rows, parts.cols = 2**32 - 1, 2**31


LIES: dict[str, tuple[Callable[[Parts], None], str]] = {
    "zero_point of 8 rows": (short_zero_point, "zero_point of 8 elements does not fit"),
    "zero_point of integers": (
        integer_zero_point,
        r"zero_point is .*int32.*allowed: torch.float32",
    ),
    "scales without columns": (empty_scales, r"scale is .* of shape \(96, 0\)"),
    "no scales": (no_scales, "scale of 0 elements does not fit"),
    "a scale too many": (long_scales, "act_pre_scale of 65 elements does not fit"),
    "scales of 8 bytes": (wide_scales, r"scale is .*int64"),
    "a matrix of 8 GB": (bomb, r"2,147,395,600 weights, more than 16,384 a byte"),
    "sizes that wrap": (wrapping_tile, r"container of 2147483648x2147483648 weights"),
    "sizes that wrap otherwise": (wrapping_rows, r"container of 4294967295x2147483648 weights"),
    "a corner": (
        said(logical_shape=[64, 64]),
        r"logical_shape=\[64, 64\] of a matrix of 96x64: allowed: \[96, 64\]",
    ),
    "rows that are not there": (
        said(window=[64, 96, 0, 64]),
        r"window=\[64, 96, 0, 64\] of a matrix of 96x64",
    ),
    "a window of no rows": (said(window=[0, 0, 0, 64]), "of a matrix of 96x64"),
    "another number of weights": (
        said(window=[0, 96, 0, 64], logical_shape=[96, 65]),
        r"logical_shape=\[96, 65\] of 96 rows and 64 columns",
    ),
    "rows of another length": (
        said(window=[0, 96, 0, 64], logical_shape=[64, 96]),
        r"logical_shape=\[64, 96\] of 96 rows and 64 columns",
    ),
    "transposed, but not in shape": (
        said(transposed=True),
        r"logical_shape=\[96, 64\] of a matrix of 96x64: allowed: \[64, 96\]",
    ),
    "transposed by a word": (said(transposed="garbage"), "transposed='garbage': allowed"),
    "transposed by a number": (said(transposed=1), "transposed=1: allowed"),
    "negative sizes": (said(logical_shape=[-96, -64]), r"logical_shape=\[-96, -64\]: allowed"),
    "sizes that overflow": (said(logical_shape=[2**31, 2**31, 4]), "fewer than 2^63 weights"),
    "sizes that are no integers": (said(logical_shape=[96, 64.0]), "allowed: a list of sizes"),
    "no shape": (said(logical_shape=None), "logical_shape=None: allowed"),
    "a window of three": (said(window=[0, 96, 0]), r"window=\[0, 96, 0\]: allowed"),
    "integers": (said(logical_dtype=torch.int8), r"logical_dtype=torch.int8: allowed"),
    "no tiles": (changed(tiles=[]), "format 1 does not allow"),
    "more tiles than rows": (
        lambda parts: setattr(parts, "tiles", parts.tiles[:1] * 97),
        "format 1 does not allow",
    ),
    "a codec from nowhere": (changed(codec=b"nowhere"), "codec 'nowhere', which this version"),
    "a name that is no text": (changed(codec=b"\xff\x1b[2J"), "which this version"),
}


@pytest.fixture(params=LIES)
def lied(request: pytest.FixtureRequest, weight: CodecTensor) -> tuple[CodecTensor, str]:
    change, message = LIES[request.param]
    return lie(weight, change), message.replace("^", r"\^")


def test_honest_parts_make_the_same_weight(weight: CodecTensor) -> None:
    again = weight_of(parts_of(weight))
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_blocks_of_a_codec_that_has_none() -> None:
    weight = CodecTensor.from_hp(torch.randn(96, 64), codec_weight_only("lossless"))
    parts = parts_of(weight)
    parts.tiles, parts.across = parts.tiles * 2, 2
    with pytest.raises(CodecError, match="tiles of codec 'lossless' are blocks"):
        weight_of(parts).check()


def test_first_use(lied: tuple[CodecTensor, str]) -> None:
    tensor, message = lied
    for use in (
        lambda: F.linear(X, tensor),
        lambda: tensor.dequantize(),
        lambda: F.embedding(torch.tensor([0]), tensor),
        lambda: torch.nn.Parameter(tensor, requires_grad=False),
        lambda: tensor.t(),
        lambda: tensor[:8],
        lambda: X @ tensor,
    ):
        with pytest.raises(CodecError, match=message):
            use()


def test_load_state_dict(weight: CodecTensor, lied: tuple[CodecTensor, str]) -> None:
    tensor, message = lied
    for assign in (False, True):
        model = torch.nn.Linear(64, 96, bias=False)
        model.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        # torch itself tells other shapes than the model's.
        with pytest.raises(RuntimeError, match=f"{message}|size mismatch for weight"):
            model.load_state_dict({"weight": tensor}, assign=assign)
        assert torch.equal(model.weight.dequantize(), weight.dequantize())


def test_torch_load(tmp_path: Path, lied: tuple[CodecTensor, str]) -> None:
    tensor, message = lied
    file = io.BytesIO()
    torch.save({"w": tensor}, file)
    file.seek(0)
    with pytest.raises(CodecError, match=message):
        torch.load(file, weights_only=True)


def test_load_file(tmp_path: Path, lied: tuple[CodecTensor, str]) -> None:
    tensor, message = lied
    if tensor.logical_shape is not None and str(tensor.logical_dtype) == "torch.int8":
        message = "logical_dtype=.*int8.*allowed"
    path = stored(tmp_path / "m.safetensors", tensor)
    with pytest.raises(CodecError, match=rf"m\.safetensors: layers\.0\.weight: .*{message}"):
        load_file(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama, compressed."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    model, config = tiny_llama(), codec_weight_only(bits=6, preset="fast")
    quantize_(model, config, lambda module, name: name.endswith("_proj"))
    save_compressed(model, folder, config, embeddings=False)
    return folder


def edited(
    source: Path, target: Path, edit: Callable[[dict[str, Tensor], dict[str, str]], None]
) -> Path:
    """A directory with other tensors or metadata in its safetensors file."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    with safetensors.safe_open(source / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    edit(tensors, metadata)
    safetensors.torch.save_file(tensors, target / "model.safetensors", metadata)
    return target


UP = "model.layers.1.mlp.up_proj"


def test_from_pretrained(tmp_path: Path, llama: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(llama) is not None

    def short(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        tensors[f"{UP}._weight_scale"] = tensors[f"{UP}._weight_scale"].repeat(5)

    def corner(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        entry = json.loads(metadata[f"{UP}.weight"])
        entry["_data"]["logical_shape"] = [64, 64]
        metadata[f"{UP}.weight"] = json.dumps(entry)

    def word(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        entry = json.loads(metadata[f"{UP}.weight"])
        entry["_data"]["transposed"] = "garbage"
        metadata[f"{UP}.weight"] = json.dumps(entry)

    for edit, message in (
        (short, "corrupt or of another matrix"),
        (corner, r"logical_shape=\[64, 64\] of a matrix"),
        (word, "transposed='garbage'"),
    ):
        folder = edited(llama, tmp_path / edit.__name__, edit)
        with pytest.raises(CodecError, match=rf"{UP}\.weight: .*{message}"):
            AutoModelForCausalLM.from_pretrained(folder)


def swap(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Two whole weights of one shape, each with all that belongs to it, under each other's name."""
    a, b = "model.layers.0.mlp.up_proj", UP
    for part in ("qdata", "scale", "act_pre_scale"):
        one, other = f"{a}._weight_{part}", f"{b}._weight_{part}"
        tensors[one], tensors[other] = tensors[other], tensors[one]


def swap_with_metadata(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    swap(tensors, metadata)
    a, b = "model.layers.0.mlp.up_proj.weight", f"{UP}.weight"
    metadata[a], metadata[b] = metadata[b], metadata[a]


@pytest.mark.parametrize("edit", [swap, swap_with_metadata])
def test_swapped_weights(
    tmp_path: Path, llama: Path, edit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = edited(llama, tmp_path / "swapped", edit)
    with pytest.raises(CodecError, match="stored under"):
        load_file(folder / "model.safetensors")
    if edit is swap:
        with pytest.raises(CodecError, match=r"up_proj\.weight: .*not stored under this name"):
            AutoModelForCausalLM.from_pretrained(folder)
    assert main(["verify", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out.count("stored under") == 2
    assert "2 errors" in err


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


METADATA: dict[str, tuple[Callable[[dict[str, str]], None], str]] = {
    "no names": (lambda m: m.pop("tensor_names"), "does not say of which weight"),
    "names that are no JSON": (lambda m: m.update(tensor_names="{"), "tensor_names is not JSON"),
    "names in a string": (lambda m: m.update(tensor_names='"a"'), "is JSON of str: needed: list"),
    "names that are numbers": (lambda m: m.update(tensor_names="[1]"), "needed: different names"),
    "one name twice": (lambda m: m.update(tensor_names='["a", "a"]'), "needed: different names"),
    # It may be in another file of the model.
    "no such name": (lambda m: m.update(tensor_names='["a"]'), "does not say of which weight"),
    "no entry": (lambda m: m.pop(NAME), "the metadata says nothing"),
    "other names": (lambda m: m.update(tensor_names="[]"), "does not say of which weight"),
    "deep names": (lambda m: m.update(tensor_names=deep(100_000)), "not JSON that can be read"),
    "a deep entry": (lambda m: m.update({NAME: deep(100_000)}), "not JSON that can be read"),
    "an entry in a list": (lambda m: m.update({NAME: "[]"}), "is JSON of list: needed: dict"),
    "an empty entry": (lambda m: m.update({NAME: "{}"}), "does not say what it is"),
    "no attributes": (lambda m: entry(m, _data={}), "_data={}: needed: logical_dtype"),
    "attributes in a list": (lambda m: entry(m, _data=[1]), r"_data=\[1\]: needed"),
    "an attribute more": (lambda m: data(m, dequantize=1), "needed: logical_dtype"),
    "a dtype in a string": (lambda m: data(m, logical_dtype="float32"), "logical_dtype='float32'"),
    "a dtype of another kind": (
        lambda m: data(m, logical_dtype={"_type": "torch.dtype", "_data": "load"}),
        "logical_dtype=",
    ),
    "no arrays": (lambda m: entry(m, _tensor_data_names=[]), r"_tensor_data_names=\[\]: needed"),
    "arrays that are no list": (lambda m: entry(m, _tensor_data_names=7), "=7: needed"),
    "other arrays": (lambda m: entry(m, _tensor_data_names=["qdata", "x", "y"]), "needed: qdata"),
    "an array that is not there": (
        lambda m: entry(m, _tensor_data_names=["qdata", "scale", "act_pre_scale", "zero_point"]),
        "lacks its part",
    ),
    "a binding to another": (lambda m: data(m, binding=["x", "00"]), "under another name"),
    "a binding that is wrong": (lambda m: data(m, binding=[NAME, "00"]), "not stored under"),
    "a binding that is none": (lambda m: data(m, binding="x"), "binding='x': allowed"),
    "tied to nothing": (lambda m: m.update(tied='{"a": "b"}'), "a is tied to 'b'"),
    "tied in a list": (lambda m: m.update(tied="[]"), "tied is JSON of list"),
    "tied to a list": (lambda m: m.update(tied='{"a": []}'), r"a is tied to \[\]"),
}


def entry(metadata: dict[str, str], **changes: Any) -> None:
    metadata[NAME] = json.dumps(json.loads(metadata[NAME]) | changes)


def data(metadata: dict[str, str], **changes: Any) -> None:
    entry(metadata, _data=json.loads(metadata[NAME])["_data"] | changes)


@pytest.fixture(scope="module")
def small() -> CodecTensor:
    values = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    return CodecTensor.from_hp(values, codec_weight_only(bits=6, preset="fast"))


@pytest.mark.parametrize("what", METADATA)
def test_metadata(tmp_path: Path, small: CodecTensor, what: str) -> None:
    change, message = METADATA[what]
    path = tmp_path / "m.safetensors"
    save_file({NAME: small}, path)
    with safetensors.safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    change(metadata)
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(CodecError, match=message):
        load_file(path)
    assert main(["verify", str(path)]) == 1


def cut_short(contents: bytes) -> bytes:
    return contents[:-1]


@pytest.mark.parametrize(
    "change",
    [
        cut_short,
        lambda contents: b"",
        lambda contents: b"PK\x03\x04 of another program",
        lambda contents: b"\xff" * 8 + contents[8:],
        lambda contents: contents[:8] + b"[" * len(contents[8:]),
        lambda contents: contents.replace(b'"U8"', b'"U9"'),
    ],
)
def test_no_safetensors(
    tmp_path: Path,
    small: CodecTensor,
    change: Callable[[bytes], bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "m.safetensors"
    save_file({NAME: small}, path)
    path.write_bytes(change(path.read_bytes()))
    for load in (load_file, load_metadata, lambda path: load_folder(path.parent)):
        with pytest.raises(CodecError, match=r"m\.safetensors cannot be read as safetensors: \w+"):
            load(path)
    assert main(["verify", str(path)]) == 1
    told = capsys.readouterr().err
    assert re.search(r"m\.safetensors (cannot be read as|is no|has no) safetensors", told)


def test_a_device_that_there_is_not(tmp_path: Path, small: CodecTensor) -> None:
    save_file({NAME: small}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"device='nowhere': allowed: a torch\.device"):
        load_file(tmp_path / "m.safetensors", device="nowhere")


def test_a_weight_map_that_leads_elsewhere(tmp_path: Path, small: CodecTensor) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({NAME: small}, tmp_path / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    for contents, message in (
        ('{"weight_map": {"a": "../secret.safetensors"}}', "allowed: files beside the index"),
        (f'{{"weight_map": {{"a": "{tmp_path}/secret.safetensors"}}}}', "files beside the index"),
        ('{"weight_map": {"a": ".."}}', "allowed: files beside the index"),
        ('{"weight_map": {"a": 1}}', "weight_map: needed: names"),
        ('{"weight_map": []}', "weight_map: needed: names"),
        ("[]", "is JSON of list"),
        ("{", "is not JSON"),
        (deep(100_000), "is not JSON that can be read"),
    ):
        index.write_text(contents)
        with pytest.raises(CodecError, match=message):
            load_folder(folder)


class _Pickled:
    """Pickles as a CodecTensor of another state."""

    def __init__(self, tensor: CodecTensor, **state: Any) -> None:
        self.tensor, self.state = tensor, state

    def __reduce_ex__(self, protocol: Any) -> Any:
        rebuild, (function, kind, args, state) = self.tensor.__reduce_ex__(2)
        return rebuild, (function, kind, args, {**state, **self.state})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"dequantize": torch.float32}, "has the attribute 'dequantize'"),
        ({"resolved_window": [0, 1, 0, 1]}, "has the attribute 'resolved_window'"),
        ({"__class__": torch.float32}, "has the attribute '__class__'"),
        ({"qdata": "bytes"}, "qdata is str: allowed: torch.Tensor"),
        ({"scale": None}, "scale is NoneType: allowed: torch.Tensor"),
        ({"logical_shape": [48, 128]}, r"shows shape \[96, 64\]"),
        ({"logical_dtype": torch.float16}, r"shows shape \[96, 64\] and torch.float32"),
        ({"_checked": True, "transposed": "garbage"}, "transposed='garbage'"),
    ],
)
def test_pickled_attributes(small: CodecTensor, state: dict[str, Any], message: str) -> None:
    file = io.BytesIO()
    torch.save({"w": _Pickled(small, **state)}, file)
    file.seek(0)
    with pytest.raises(CodecError, match=message):
        torch.load(file, weights_only=True)


def test_an_expanded_array_takes_no_memory(small: CodecTensor) -> None:
    """One byte that says it is a terabyte."""
    file = io.BytesIO()
    torch.save({"w": _Pickled(small, qdata=torch.zeros(1, dtype=torch.uint8).expand(2**40))}, file)
    assert file.tell() < 10_000
    file.seek(0)
    with pytest.raises(CodecError, match="qdata has the stride 0"):
        torch.load(file, weights_only=True)


def test_a_weight_as_a_part_of_a_weight(small: CodecTensor) -> None:
    parts = parts_of(small).attributes
    nested = CodecTensor(small, scale=small.scale, act_pre_scale=small.act_pre_scale, **parts)
    assert torch.equal(nested.dequantize(), small.dequantize())  # a copy, as accelerate makes them
    file = io.BytesIO()
    torch.save({"w": _Pickled(small, qdata=small)}, file)
    file.seek(0)
    with pytest.raises(CodecError, match="qdata is CodecTensor"):
        torch.load(file, weights_only=True)


@pytest.fixture
def all_allowed() -> Iterator[None]:
    with allowed_codecs(None):
        yield


def test_codecs_that_are_not_allowed(tmp_path: Path, all_allowed: None) -> None:
    weight = CodecTensor.from_hp(torch.randn(64, 64), codec_weight_only("h264", bits=4))
    path = tmp_path / "m.safetensors"
    save_file({"w": weight}, path)
    message = r"w: encoded with the codec 'h264', by which files may not be decoded here"
    with pytest.raises(CodecError, match=rf"{message}: allowed: 'ectcq', 'lossless'"):
        load_file(path, allowed_codecs=["ectcq", "lossless"])
    load_file(path, allowed_codecs=["h264"])
    with allowed_codecs(["ectcq"]):
        with pytest.raises(CodecError, match=rf"{message}: allowed: 'ectcq', as allowed_codecs"):
            load_file(path)
        with pytest.raises(CodecError, match="as allowed_codecs"):
            load_file(path, allowed_codecs=["h264"])
        with pytest.raises(CodecError, match="by which files may not be decoded"):
            pickle.loads(pickle.dumps(weight))
    load_file(path)
    with pytest.raises(ValueError, match="codec='h265' is not a known codec"):
        allowed_codecs(["h265"])
    with pytest.raises(ValueError, match="allowed_codecs='h264': allowed: a list"):
        load_file(path, allowed_codecs="h264")
    assert main(["verify", str(path), "--allow-codecs", "ectcq,lossless"]) == 1
    assert main(["verify", str(path), "--allow-codecs", "h264"]) == 0


def test_codecs_that_the_environment_allows(tmp_path: Path) -> None:
    weight = CodecTensor.from_hp(torch.randn(64, 64), codec_weight_only("h264", bits=4))
    path = tmp_path / "m.safetensors"
    save_file({"w": weight}, path)
    command = [sys.executable, "-m", "torchcodec_weights.cli", "verify", str(path)]
    variable = "TORCHCODEC_WEIGHTS_ALLOWED_CODECS"
    import os

    refused = subprocess.run(
        command, env={**os.environ, variable: "ectcq, lossless"}, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert "allowed: 'ectcq', 'lossless', as allowed_codecs() or " + variable in refused.stdout
    taken = subprocess.run(command, env={**os.environ, variable: "h264"}, capture_output=True)
    assert taken.returncode == 0


def test_expansion_can_be_allowed(small: CodecTensor) -> None:
    parts = parts_of(small)
    bomb(parts)
    parts.rows = parts.cols = 4_100  # 16,810,000 weights: 2^24 are always taken
    with pytest.raises(CodecError, match=r"more than 16,384 a byte.*max_expansion\(\)"):
        weight_of(parts).check()
    with max_expansion(10**6):
        weight_of(parts).check()
    parts.rows = parts.cols = 4_096
    weight_of(parts).check()
    with pytest.raises(ValueError, match="weights_per_byte=0: allowed: an integer above 0"):
        max_expansion(0)


@pytest.mark.parametrize("number", [1.5, 2.0, True, float("inf"), -1, "7", None])
def test_expansion_is_an_integer(number: Any) -> None:
    with pytest.raises(ValueError, match=r"weights_per_byte=.*: allowed: an integer above 0"):
        max_expansion(number)


def test_zeros_are_no_bomb() -> None:
    """What encoders make of the simplest weights there are stays below the limit."""
    for codec in ("av1", "lossless", "h264"):
        bits = None if codec == "lossless" else 2
        weight = CodecTensor.from_hp(torch.zeros(4096, 4608), codec_weight_only(codec, bits))
        weight_of(parts_of(weight)).check()


def test_compiled_code_checks_sizes_itself(small: CodecTensor) -> None:
    from dataclasses import replace

    from torchcodec_weights.matrix.opened import open_matrix

    for codec in ("ectcq", "lossless"):
        config = codec_weight_only(codec, 6 if codec == "ectcq" else None)
        matrix = open_matrix(*CodecTensor.from_hp(torch.randn(96, 64), config).coded)
        good = matrix.stored()
        out = np.zeros((96, 64), np.float32)
        for sizes in ({"rows": 2**31, "cols": 2**31}, {"rows": 2**32, "cols": 1}, {"rows": 0}):
            with pytest.raises(CodecError, match="sizes or tables"):
                matrix.codec.decode_tiles(
                    replace(good, **sizes), range(1), out.ctypes.data, "float32", 1
                )
        with pytest.raises(CodecError, match="sizes or tables"):
            matrix.codec.decode_tiles(good, range(1, 2), out.ctypes.data, "float32", 1)


def test_nothing_outlives_a_weight(tmp_path: Path, small: CodecTensor) -> None:
    """Private data of 32 MB that a header brings is gone with the weight."""
    import gc
    import tracemalloc

    parts = parts_of(small)
    parts.private = bytes(2**25)
    path = stored(tmp_path / "m.safetensors", weight_of(parts))
    tracemalloc.start()
    try:
        loaded = load_file(path)
        assert loaded[NAME].shape == (96, 64)
        del loaded
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 2**22
    finally:
        tracemalloc.stop()


def test_a_header_of_the_same_crc_is_another(small: CodecTensor) -> None:
    """Written over the first in place, under the header CRC of the first."""
    parts = parts_of(small)
    parts.scale = parts.act_pre_scale = np.full(1, 127, np.uint8)
    parts.zero_point = None
    first = weight_of(parts)
    expected = first.dequantize()
    header = parse_header(memoryview(packed(parts)))
    wanted = int.from_bytes(header.raw[-4:], "little")
    parts.tiles = [(payload, outliers, 2 * unit) for payload, outliers, unit in parts.tiles]
    forged = bytearray(packed(parts))
    end = int.from_bytes(forged[8:12], "little") - 4
    # A CRC is linear: 32 bits of snr_db, which means nothing, can give it any value.
    base = crc32c(bytes(forged[:48]) + bytes(4) + bytes(forged[52:end]))
    columns = [
        crc32c(bytes(forged[:48]) + (1 << bit).to_bytes(4, "little") + bytes(forged[52:end])) ^ base
        for bit in range(32)
    ]
    forged[48:52] = _solve(columns, wanted ^ base).to_bytes(4, "little")
    forged[end : end + 4] = wanted.to_bytes(4, "little")
    assert crc32c(bytes(forged[:end])) == wanted
    first.qdata.copy_(torch.frombuffer(forged, dtype=torch.uint8))
    torch.testing.assert_close(first.dequantize(), 2 * expected)


def _solve(columns: list[int], wanted: int) -> int:
    """Bits whose columns add up, without carry, to a number."""
    basis: list[tuple[int, int]] = []
    for index, column in enumerate(columns):
        mask = 1 << index
        for value, of in basis:
            if column ^ value < column:
                column, mask = column ^ value, mask ^ of
        if column:
            basis.append((column, mask))
            basis.sort(reverse=True)
    chosen = 0
    for value, of in basis:
        if wanted ^ value < wanted:
            wanted, chosen = wanted ^ value, chosen ^ of
    assert not wanted
    return chosen


def test_the_tile_table_is_read_from_whole_words(small: CodecTensor) -> None:
    """A header may be of any length, so its table lies at any address."""
    from torchcodec_weights.matrix.opened import open_matrix

    for private in range(4):
        parts = parts_of(small)
        parts.private += bytes(private)
        stored_matrix = open_matrix(*weight_of(parts).coded).stored()
        for array in (stored_matrix.crcs, stored_matrix.units, stored_matrix.payload_sizes):
            assert array.ctypes.data % array.itemsize == 0


@pytest.mark.skipif(
    Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1"
    if Path("/proc/sys/vm/overcommit_memory").exists()
    else True,
    reason="the system promises any memory",
)
def test_more_memory_than_there_is(small: CodecTensor) -> None:
    """What the limits allow, or were told to, may still be more than the machine has."""
    parts = parts_of(small)
    parts.scale = parts.act_pre_scale = np.full(1, 127, np.uint8)
    parts.zero_point = None
    parts.rows, parts.cols = 2**20, 2**19  # 2 TB
    parts.tiles *= 2**10
    parts.attributes["logical_shape"] = [2**20, 2**19]
    with max_expansion(2**30), pytest.raises(CodecError, match="no memory for 1048576x524288"):
        weight_of(parts).dequantize()
