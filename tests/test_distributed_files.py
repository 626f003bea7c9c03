"""What ranks read of a compressed checkpoint that they open: the pages of their tiles.

Files are mapped to memory, so that what nobody looks at is not needed. Tests count the pages of
the mapping that are in memory. The kernel maps 16 pages around each that is looked at; of a file
that was just written, and is in its cache in large pieces, it maps up to megabytes, so that is
dropped from there first.
"""

import gc
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from test_distributed import GROUP, on_two_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM

from torchcodec_weights import CodecTensor, load_file
from torchcodec_weights.cli import main

NAME = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 30 MB, its matrices of 8 tiles and more, as `compress` writes it."""
    models = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 1}
    tiny_llama(num_key_value_heads=4, **sizes).save_pretrained(models / "dense")
    coded = models / "coded"
    assert main(["compress", str(models / "dense"), str(coded), "--codec", "lossless"]) == 0
    return coded


@pytest.fixture
def expected(folder: Path) -> Tensor:
    """What the model says; its file is not in the kernel's cache any more."""
    result = logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
    gc.collect()  # modules of a model refer to each other, and what is mapped is not dropped
    assert not touched(folder)
    with (folder / NAME).open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return result


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits


def touched(folder: Path) -> float:
    """Share of the file that is in memory, in this process's mapping."""
    path, resident, here = folder / NAME, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            here = line.endswith(str(path))
        elif here and first == "Rss:":
            resident += 1024 * int(rest[0])
    return resident / path.stat().st_size


def open_model(folder: Path) -> tuple[Any, list[Tensor]]:
    """A model, and tensors that keep the file mapped."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    weights = [parameter.data for parameter in model.parameters()]
    return model, [getattr(weight, "qdata", weight) for weight in weights]


def _fully_shard(folder: Path, expected: Tensor, rank: int) -> None:
    model, mapped = open_model(folder)
    opened = touched(folder)
    assert 0 < opened < 0.1
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    share = touched(folder)
    assert len(mapped)
    assert 0.4 < share < 0.6


@pytest.mark.feature(
    GROUP, "FSDP2 of a model whose file is mapped", "a rank reads headers, and its half of the rows"
)
def test_ranks_of_fsdp_read_their_tiles(folder: Path, expected: Tensor) -> None:
    on_two_ranks(partial(_fully_shard, folder, expected))


def _parallelize(folder: Path, expected: Tensor, rank: int) -> None:
    model, mapped = open_model(folder)
    words = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    halved = sum(
        parameter.stored_bytes
        for name, parameter in model.named_parameters()
        if isinstance(parameter, CodecTensor) and any(word in name for word in words)
    )
    should = 1 - 0.5 * halved / (folder / NAME).stat().st_size
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    plan = {name: styles[style]() for name, style in model.tp_plan.items() if style in styles}
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, plan, src_data_rank=None)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    share = touched(folder)
    assert len(mapped)
    assert should - 0.1 < share < should + 0.05


@pytest.mark.feature(
    GROUP,
    "tensor parallelism of a model whose file is mapped",
    "`src_data_rank=None`; read are a rank's rows, and all of what is shared by columns",
)
def test_ranks_of_a_tensor_parallel_plan_read_their_tiles(folder: Path, expected: Tensor) -> None:
    on_two_ranks(partial(_parallelize, folder, expected))


def _distribute(folder: Path, rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    loaded: dict[str, Any] = dict(load_file(folder / NAME))
    for name, weight in loaded.items():
        if isinstance(weight, CodecTensor):
            shard = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None).to_local()
            loaded[name] = weight.qdata, shard.dequantize()
    share = touched(folder)
    assert 0.4 < share < 0.6
    planned = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", tp_plan="auto")
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    torch.testing.assert_close(logits(planned), logits(alone))


@pytest.mark.feature(
    GROUP,
    "`distribute_tensor` of what `load_file` mapped",
    'with `from_pretrained(tp_plan="auto")` each rank has all of the model',
)
@pytest.mark.usefixtures("expected")
def test_ranks_that_distribute_read_their_tiles(folder: Path) -> None:
    on_two_ranks(partial(_distribute, folder))
