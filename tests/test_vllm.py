"""The plug-in of vLLM where vLLM is not installed: how a layer's weight is joined, and signatures.

`tests/data/vllm_signatures.json` has the names of parameters of vLLM's functions, read from its
source. tests/test_vllm_classes.py runs the plug-in in vLLM itself.
"""

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchcodec_weights
from torchcodec_weights import CodecError, CodecTensor, codec_weight_only
from torchcodec_weights.models.checkpoint import flatten
from torchcodec_weights.vllm import register
from torchcodec_weights.vllm.shards import ShardedWeight

CPU = torch.device("cpu")
PACKAGE = Path(torchcodec_weights.__file__).parent
DATA = Path(__file__).parent / "data"
HEADS = {"q": 4, "k": 2, "v": 2}  # of 32 rows each


def encoded(rows: int, cols: int, seed: int) -> CodecTensor:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return CodecTensor.from_hp(weight, codec_weight_only(bits=4, preset="fast"))


def parts(weight: Tensor) -> dict[str, Tensor]:
    """A weight as a file holds it, by the names that `ShardedWeight.add` takes."""
    inner, _ = flatten("weight", weight)
    return {name.removeprefix("_weight_"): tensor for name, tensor in inner.items()}


def load_joined(rank: int, ranks: int) -> Callable[..., None]:
    """What a layer of vLLM does that joins query, key and value: a slice of each for each rank."""

    def load(parameter: nn.Parameter, loaded: Tensor, shard: str) -> None:
        target = parameter.data
        dim = getattr(parameter, "output_dim", None)
        if dim is not None:
            sizes = {name: 32 * heads // ranks for name, heads in HEADS.items()}
            first = {"q": 0, "k": sizes["q"], "v": sizes["q"] + sizes["k"]}[shard]
            target = target.narrow(dim, first, sizes[shard])
            loaded = loaded.narrow(dim, rank * sizes[shard], sizes[shard])
        assert target.shape == loaded.shape
        target.copy_(loaded)

    return load


def load_cols(rank: int) -> Callable[..., None]:
    """What a layer of vLLM does that is parallel in its input."""

    def load(parameter: nn.Parameter, loaded: Tensor) -> None:
        dim = getattr(parameter, "input_dim", None)
        if dim is not None:
            size = parameter.shape[dim]
            loaded = loaded.narrow(dim, rank * size, size)
        assert parameter.data.shape == loaded.shape
        parameter.data.copy_(loaded)

    return load


def load_padded(first: int, size: int) -> Callable[..., None]:
    """What a padded vocabulary of vLLM does: rows of padding become 0."""

    def load(parameter: nn.Parameter, loaded: Tensor) -> None:
        loaded = loaded.narrow(0, first, size)
        parameter[:size].data.copy_(loaded)
        parameter[size:].data.fill_(0)

    return load


def dense(weight: Tensor) -> Tensor:
    return weight.dequantize() if isinstance(weight, CodecTensor) else weight


@pytest.mark.parametrize("ranks", [1, 2])
def test_query_key_and_value_are_joined(ranks: int) -> None:
    """The key is dense in the file, and the value comes as a CodecTensor."""
    weights = {"q": encoded(128, 64, 0), "k": torch.randn(64, 64), "v": encoded(64, 64, 1)}
    for rank in range(ranks):
        sharded = ShardedWeight("qkv", 256 // ranks, 64, torch.float32, load_joined(rank, ranks))
        sharded.add("weight", weights["v"], "v")
        for part, tensor in parts(weights["q"]).items():
            reused = tensor.clone()
            sharded.add(part, reused, "q")
            reused.zero_()  # as vLLM's readers may use it for what they read next
        sharded.add("weight", weights["k"], "k")
        pieces = sharded.finish(CPU)
        kinds = [type(piece.weight) for piece in pieces]
        assert kinds == [CodecTensor, Tensor, CodecTensor]
        wanted = [dense(weight).chunk(ranks)[rank] for weight in weights.values()]
        assert torch.equal(torch.cat([dense(p.weight) for p in pieces]), torch.cat(wanted))
        assert sharded.finish(CPU) is pieces


def test_columns_of_a_rank() -> None:
    weight = encoded(64, 128, 2)
    for rank in range(2):
        sharded = ShardedWeight("down", 64, 64, torch.float32, load_cols(rank))
        for part, tensor in parts(weight).items():
            sharded.add(part, tensor)
        [(first, piece)] = sharded.finish(CPU)
        assert first == 0
        assert isinstance(piece, CodecTensor)
        assert torch.equal(piece.dequantize(), weight.dequantize().chunk(2, 1)[rank])


def test_a_padded_vocabulary() -> None:
    weight = encoded(100, 32, 3)
    for first, size in ((0, 64), (64, 36), (100, 0)):
        place = load_padded(first, size)
        sharded = ShardedWeight("embed", 64, 32, torch.bfloat16, place, padded=True)
        for part, tensor in parts(weight).items():
            sharded.add(part, tensor)
        pieces = sharded.finish(CPU)
        assert [piece.weight.dtype for piece in pieces] == [torch.bfloat16] * (size > 0)
        wanted = weight.dequantize(torch.bfloat16)[first : first + size]
        found = [dense(piece.weight) for piece in pieces]
        assert torch.equal(torch.cat([wanted[:0], *found]), wanted)


def test_what_cannot_be_joined_is_refused() -> None:
    weight = encoded(128, 64, 4)

    def new() -> ShardedWeight:
        return ShardedWeight("layer.qkv", 256, 64, torch.float32, load_joined(0, 1))

    sharded = new()
    sharded.add("qdata", weight.qdata, "q")
    with pytest.raises(CodecError, match=r"layer.qkv shard 'q': qdata is in the checkpoint twice"):
        sharded.add("qdata", weight.qdata, "q")
    with pytest.raises(CodecError, match=r"shard 'q': lacks its parts scale, act_pre_scale"):
        sharded.finish(CPU)

    sharded = new()
    sharded.add("weight", weight, "q")
    sharded.add("weight", torch.randn(64, 64), "v")
    with pytest.raises(CodecError, match=r"layer.qkv: rows 128:192 are missing"):
        sharded.finish(CPU)

    sharded = new()
    sharded.add("weight", weight, "q")
    sharded.add("weight", weight, "q")
    with pytest.raises(CodecError, match=r"layer.qkv: rows 0:128 are in the checkpoint twice"):
        sharded.finish(CPU)

    with pytest.raises(CodecError, match=r"layer.qkv: rows 0:256 are missing"):
        new().finish(CPU)
    with pytest.raises(CodecError, match=r"embed: rows 0:64 are missing"):
        ShardedWeight("embed", 64, 64, torch.float32, load_padded(0, 0), padded=True).finish(CPU)
    with pytest.raises(CodecError, match=r"shape \(64, 64\) does not fit"):
        new().add("weight", torch.randn(64, 64), "q")
    with pytest.raises(CodecError, match=r"shape \(128, 96\) does not fit"):
        new().add("weight", torch.randn(128, 96), "q")

    sharded = new()
    damaged = parts(weight)
    damaged["qdata"] = damaged["qdata"].clone()
    damaged["qdata"][20] ^= 1
    for part, tensor in damaged.items():
        sharded.add(part, tensor, "q")
    with pytest.raises(CodecError, match=r"layer.qkv shard 'q': "):
        sharded.finish(CPU)


def functions() -> dict[str, list[str]]:
    """Functions of our classes to the names of their parameters."""
    found = {}
    tree = ast.parse((PACKAGE / "vllm" / "quantization.py").read_text())
    for kind in tree.body:
        for node in kind.body if isinstance(kind, ast.ClassDef) else []:
            if isinstance(node, ast.FunctionDef):
                names = [argument.arg for argument in node.args.args]
                rest = [f"**{node.args.kwarg.arg}"] if node.args.kwarg else []
                found[f"{kind.name}.{node.name}"] = names + rest
    return found


def test_parameters_are_those_of_vllm() -> None:
    recorded = json.loads((DATA / "vllm_signatures.json").read_text())["parameters"]
    theirs = {name.split(".", name.count(".") - 1)[-1]: names for name, names in recorded.items()}
    ours = functions()
    for base, kinds in {
        "QuantizationConfig": ("CodecConfig",),
        "LinearMethodBase": ("_CodecMethod",),
        "QuantizeMethodBase": ("_CodecMethod", "CodecEmbeddingMethod"),
    }.items():
        compared = 0
        for kind in kinds:
            for name in [name.partition(".")[2] for name in ours if name.startswith(f"{kind}.")]:
                wanted = theirs.get(f"{base}.{name}")
                if wanted is not None and not any(n.startswith("*") for n in wanted[2:3]):
                    assert ours[f"{kind}.{name}"] == wanted, f"{base}.{name}"
                    compared += 1
        assert compared >= 2
    # What joins hands the shard on as the third argument, which has different names.
    loaders = {name: names for name, names in theirs.items() if name.endswith(".weight_loader")}
    assert len(loaders) == 5
    for names in loaders.values():
        assert names[:3] == ["self", "param", "loaded_weight"]
        assert len(names) <= 4


def test_registration_without_vllm() -> None:
    table: dict[str, Any] = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    [entry] = table["project"]["entry-points"]["vllm.general_plugins"].values()
    assert entry == f"{register.__module__}:{register.__name__}"
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "from torchcodec_weights.vllm import register; register(); register()\n"
        "assert not any(name.startswith('vllm.') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
