"""Two processes on one machine, over gloo: DTensor, tensor parallelism, FSDP2."""

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from torchcodec_weights import CodecTensor, codec_weight_only, quantize_
from torchcodec_weights.decoders import cpu
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.opened import OpenedMatrix

GROUP = "Parallelism, over two gloo processes"
CONFIG = codec_weight_only(bits=3, preset="fast")


def _process(rank: int, port: int, check: Callable[[int], None], errors: list[str]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        check(rank)
    except BaseException:
        errors.append(traceback.format_exc())
        os._exit(1)  # the other rank waits in a collective
    dist.barrier()
    dist.destroy_process_group()


def on_two_ranks(check: Callable[[int], None]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        errors = manager.list()
        try:
            mp.spawn(_process, (port, check, errors), 2)
        except mp.ProcessExitedException:
            pytest.fail("\n".join(errors) or "a process ended without an error of its own")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))
    quantize_(layers, CONFIG)
    return layers


def tokens() -> torch.Tensor:
    return torch.randn(5, 256, generator=torch.Generator().manual_seed(1))


def _distribute(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    weight = model()[0].weight.data
    assert isinstance(weight, CodecTensor)
    dense, x = weight.dequantize(), tokens()
    # What other ranks bring must not matter where rank 0 scatters.
    weight_here = weight if rank == 0 else CodecTensor.from_hp(torch.randn(1024, 256), CONFIG)
    for placement in (Shard(0), Shard(1), Replicate()):
        for source in (None, 0):
            given = weight if source is None else weight_here
            shared = distribute_tensor(given, mesh, [placement], src_data_rank=source)
            local = shared.to_local()
            assert isinstance(local, CodecTensor)
            if isinstance(placement, Shard):
                part = dense.chunk(2, placement.dim)[rank]
                assert torch.equal(local.dequantize(), part)
            if placement == Shard(0):
                assert local.stored_bytes < 0.6 * weight.stored_bytes
            replicated = distribute_tensor(x, mesh, [Replicate()])
            product = F.linear(replicated, shared)
            assert isinstance(product, DTensor)
            torch.testing.assert_close(product.full_tensor(), x @ dense.T, rtol=1e-4, atol=1e-3)


@pytest.mark.feature(GROUP, "`distribute_tensor`: rows, columns, replicated", "slices of tiles")
def test_distribute_tensor() -> None:
    on_two_ranks(_distribute)


def _parallel(rank: int) -> None:
    layers, x = model(), tokens()
    with torch.no_grad():
        expected = layers(x)
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(layers, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    decoded: list[range] = []
    original = cpu.multiply_matrix

    def watched(
        matrix: OpenedMatrix, window: Window, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        decoded.append(matrix.tiles(window.first_row, window.first_row + window.rows))
        return original(matrix, window, x, bias)

    cpu.multiply_matrix = watched
    with torch.no_grad():
        torch.testing.assert_close(layers(x), expected, rtol=1e-4, atol=1e-4)
    assert decoded[0] == (range(2), range(2, 4))[rank], "half of four tiles"


@pytest.mark.feature(
    GROUP, "tensor parallelism: `ColwiseParallel`, `RowwiseParallel`", "rows: only a rank's tiles"
)
def test_tensor_parallelism() -> None:
    on_two_ranks(_parallel)


def _shard(rank: int) -> None:
    layers, x = model(), tokens().requires_grad_()
    expected = layers(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    whole = layers[0].weight.stored_bytes
    mesh = init_device_mesh("cpu", (2,))
    for layer in (layers[0], layers[2], layers):
        fully_shard(layer, mesh=mesh)
    for _ in range(2):
        assert layers[0].weight.to_local().stored_bytes < 0.6 * whole
        got = layers(x)
        torch.testing.assert_close(got, expected)
        (same,) = torch.autograd.grad(got.square().sum(), x)
        torch.testing.assert_close(same, gradient)


@pytest.mark.feature(
    GROUP, "FSDP2 `fully_shard`", "shards and gathers bitstreams; forward, backward"
)
def test_fully_shard() -> None:
    on_two_ranks(_shard)


def _train(layers: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Any) -> list[float]:
    losses = []
    for _ in range(3):
        loss = layers(tokens()).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _adapted() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """Encoded layers with a dense one on top, which trains."""
    layers = nn.Sequential(*model(), nn.Linear(256, 256)).requires_grad_(False)
    layers[3].requires_grad_()
    return layers, torch.optim.SGD(layers.parameters(), lr=0.5)


def _accelerate(rank: int) -> None:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Linear"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # If this changes, docs/upstream_parallel.md has a paragraph too many.
    assert accelerator.distributed_type == DistributedType.MULTI_CPU
    layers, optimizer = _adapted()
    alone = _train(layers, optimizer, accelerator)
    assert alone[2] < alone[0]

    layers, optimizer = _adapted()
    with pytest.raises(ValueError, match="_ddp_params_and_buffers_to_ignore"):
        accelerator.prepare(layers)
    encoded = [name for name, p in layers.named_parameters() if isinstance(p, CodecTensor)]
    vars(layers)["_ddp_params_and_buffers_to_ignore"] = encoded
    wrapped, stepped = accelerator.prepare(layers, optimizer)
    assert _train(wrapped, stepped, accelerator) == pytest.approx(alone, rel=1e-5)

    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    layers, optimizer = accelerator.prepare(*_adapted())
    assert isinstance(layers[0].weight.to_local(), CodecTensor)
    assert _train(layers, optimizer, accelerator) == pytest.approx(alone, rel=1e-5)


@pytest.mark.feature(
    GROUP,
    "accelerate: `Accelerator.prepare`, FSDP2 and DDP",
    "on CPUs it takes DDP, for which encoded weights are named; docs/upstream_parallel.md",
)
def test_accelerate() -> None:
    on_two_ranks(_accelerate)
