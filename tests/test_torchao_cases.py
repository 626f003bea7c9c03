"""torchao's test cases for authors of tensor subclasses, with CodecTensor, on the CPU.

Where a case asks what a bitstream cannot do, or is for CUDA alone, it is overridden here, and its
docstring says why.
"""

from typing import Any

import pytest
import torch
from conftest import fastest
from test_distributed import on_two_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.overrides import TorchFunctionMode
from torchao.testing import utils as cases

from torchcodec_weights import (
    CodecError,
    CodecTensor,
    available_codecs,
    codec_weight_only,
    quantize_,
)

GROUP = "torchao's test cases for tensor subclasses"
CONFIG = codec_weight_only(snr_db=40, preset="fast")


class Basic(cases.TorchAOBasicTestCase):
    """What every codec passes; the classes are made below."""

    __test__ = False
    TENSOR_SUBCLASS = CodecTensor
    FACTORY_FN = staticmethod(CodecTensor.from_hp)

    def test_device1_to_device2_device1_cpu_device2_cpu(self) -> None:
        """torchao's also calls `.cuda()`, whatever the devices are."""
        weight = self.FACTORY_FN(torch.randn(4, 128, dtype=torch.bfloat16), **self.kwargs)
        for moved in (weight.to(device="cpu"), weight.to("cpu"), weight.cpu()):
            assert torch.equal(moved.dequantize(), weight.dequantize())


def _basic(codec: str, lossy: bool) -> type:
    config = codec_weight_only(codec, step=0.1 if lossy else None, preset=fastest(codec))
    members = {"kwargs": {"config": config}, "LINEAR_MIN_SQNR": 20, "__test__": True}
    kind = type(f"TestBasic_{codec}", (Basic,), members)
    pytest.mark.feature(GROUP, "TorchAOBasicTestCase", "every codec")(kind)
    return kind


for _info in available_codecs():
    if _info.encoder is not None:
        globals()[f"TestBasic_{_info.name}"] = _basic(_info.name, _info.lossy)


@pytest.mark.feature(GROUP, "TorchAOCompileTestCase", "`from_hp` breaks the graph")
class TestCompile(cases.TorchAOCompileTestCase):
    TENSOR_SUBCLASS = CodecTensor
    FACTORY_FN = staticmethod(CodecTensor.from_hp)
    kwargs = {"config": CONFIG}  # noqa: RUF012
    LINEAR_MIN_SQNR = 38


def _tensor_parallel(rank: int) -> None:
    case = cases.TorchAOTensorParallelTestCase
    mesh = init_device_mesh("cpu", (2,))
    for dtype in case.COMMON_DTYPES:
        torch.manual_seed(5)
        x = torch.randn(8, 128, dtype=dtype)
        up, down = _Layer(128, 256).to(dtype), _Layer(256, 128).to(dtype)
        quantize_(up, CONFIG)
        quantize_(down, CONFIG)
        expected = down(up(x))
        case.colwise_shard(up, mesh)
        case.rowwise_shard(down, mesh)
        sharded = DTensor.from_local(x, mesh, [Replicate()])
        for compiled in (False, True) if dtype == torch.float32 else (False,):
            first = torch.compile(up) if compiled else up
            second = torch.compile(down) if compiled else down
            y = second(first(sharded)).full_tensor()
            torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02 * float(expected.std()))


@pytest.mark.feature(GROUP, "TorchAOTensorParallelTestCase", "over two gloo processes")
def test_tensor_parallel() -> None:
    """torchao's `test_tp` makes its modules on CUDA; its ways to shard are used as they are."""
    on_two_ranks(_tensor_parallel)


class _Layer(nn.Module):
    def __init__(self, cols: int, rows: int) -> None:
        super().__init__()
        self.linear = nn.Linear(cols, rows, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class OnCPU(TorchFunctionMode):
    """Makes on the CPU what torchao's cases make on CUDA."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@pytest.mark.feature(
    GROUP, "TorchAOIntegrationTestCase", "weights of other lengths cannot be copied or joined"
)
class TestIntegration(cases.TorchAOIntegrationTestCase):
    def test_narrow_similar_to_vllm(self) -> None:
        with OnCPU():
            self._test_narrow_similar_to_vllm(CONFIG)

    def test_chunk_similar_to_vllm_llama4(self) -> None:
        matrix = CodecTensor.from_hp(torch.randn(300, 256), CONFIG)
        experts = CodecTensor.from_hp(torch.randn(4, 64, 96), CONFIG)
        for weight, dims in (
            (matrix, (0, 1)),
            (matrix.t(), (0, 1)),
            (experts, (0, -1)),
            (experts.transpose(1, 2), (0, -2)),
        ):
            for dim in dims:
                self._test_chunk_similar_to_vllm_llama4(weight, dim)

    def test_quantize_3d_param_similar_to_vllm(self) -> None:
        """torchao's is of 346 million weights."""
        layer = nn.Linear(64, 64)
        layer.weight = nn.Parameter(torch.randn(6, 96, 64))
        quantize_(layer, CONFIG)
        assert isinstance(layer.weight[0], CodecTensor)
        assert torch.equal(layer.weight[5].dequantize(), layer.weight.dequantize()[5])

    def test_slice_and_copy_similar_to_vllm(self) -> None:
        """torchao's copies into slices, but bitstreams of other lengths do not fit in place."""
        layer, loaded = nn.Linear(128, 256), nn.Linear(128, 256)
        quantize_(layer, CONFIG)
        quantize_(loaded, codec_weight_only(snr_db=30, preset="fast"))
        slices = layer.weight.data.narrow(0, 0, 128), loaded.weight.narrow(0, 0, 128)
        with pytest.raises(ValueError, match="bitstreams cannot be resized in place"):
            slices[0].copy_(slices[1])
        layer.load_state_dict(loaded.state_dict(), assign=True)
        assert torch.equal(layer.weight.dequantize(), loaded.weight.dequantize())

    def test_moe_weight_reshape_ops(self) -> None:
        """torchao's reshapes transposed weights, and joins several with the scales of one.

        A bitstream has one order of weights, and scales that its checksum covers.
        """
        weights = (torch.randn(2, 96, 64) * torch.rand(96, 1) for _ in range(2))
        first, second = (CodecTensor.from_hp(weight, CONFIG) for weight in weights)
        x = torch.randn(2, 3, 64)
        swapped = first.transpose(1, 2).contiguous()
        torch.testing.assert_close(
            torch.bmm(x, swapped), x @ first.dequantize().mT, rtol=1e-4, atol=1e-3
        )
        with pytest.raises(NotImplementedError, match=r"as \(-1, 96\).*dequantize"):
            swapped.reshape(-1, 96)
        for dim in (0, 1, 2):
            with pytest.raises(NotImplementedError, match="dequantize"):
                torch.cat([first, second], dim)
        second.scale = first.scale
        with pytest.raises(CodecError, match="scale, zero_point or act_pre_scale"):
            second.dequantize()
