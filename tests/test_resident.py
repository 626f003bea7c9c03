"""The first use of a weight in ECTCQ on a device: compared with the CPU, or left to it.

The kernels run on the CPU, which takes the device's place.
"""

import dataclasses
import shutil
import warnings
from collections.abc import Iterator

import pytest
import torch
from test_gpu_kernels import build, dense, host_launch, opened
from test_order import important
from torch import Tensor

from torchcodec_weights import CodecTensor, codec_weight_only, use_decoder
from torchcodec_weights.codecs.common import side_stream
from torchcodec_weights.codecs.common.cuda import Launch
from torchcodec_weights.codecs.ectcq import ECTCQ, gpu, resident
from torchcodec_weights.codecs.ectcq.columns import is_by_columns
from torchcodec_weights.codecs.ectcq.gpu import ResidentMatrix
from torchcodec_weights.codecs.ectcq.resident import CudaKernels
from torchcodec_weights.decoders import choice
from torchcodec_weights.errors import DecoderError
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.opened import OpenedMatrix, open_matrix

CPU = torch.device("cpu")
SHAPE = 300, 384

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.usefixtures("forgotten_choices"),
]


class NoUses:
    """A CPU has no streams."""

    def __init__(self, tensors: list[Tensor]) -> None:
        assert all(tensor.device == CPU for tensor in tensors)

    def record_current(self) -> None:
        pass


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return host_launch(build(tmp_path_factory.mktemp("cuda_host") / "kernels.so", "-O2"))


@pytest.fixture
def decoder(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaKernels]:
    """The kernels, used before for nothing, as the decoder of weights on the CPU."""
    made = CudaKernels()
    monkeypatch.setattr(made, "missing", lambda device: None)
    monkeypatch.setattr(ECTCQ, "decoders", lambda codec, device: (made,))
    monkeypatch.setattr(gpu, "kernels", lambda index: launch)
    monkeypatch.setattr(side_stream, "run", lambda work, device: work())
    monkeypatch.setattr(side_stream, "StreamUses", NoUses)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield made


def matrix_of(kind: str, corner: float = 60.0, seed: int = 0) -> OpenedMatrix:
    """By rows or by columns, with an outlier in a corner."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    weight[0, 0] = corner
    config = codec_weight_only("ectcq", step=0.5, preset="fast")
    if kind == "columns":
        config = codec_weight_only("ectcq", bits=3, preset="fast")
        config = config.with_importance(important(weight), 3)
    matrix = opened(CodecTensor.from_hp(weight, config))
    assert is_by_columns(matrix.header.private) == (kind == "columns")
    return matrix


def decode(matrix: OpenedMatrix) -> Tensor:
    return choice.decode(matrix, Window(0, SHAPE[0], 0, SHAPE[1]), torch.float32, CPU)


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_the_first_tile_of_each_kind_is_compared(
    kind: str, decoder: CudaKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def compare(matrix: OpenedMatrix, made: ResidentMatrix) -> None:
        resident_compare(matrix, made)
        compared.append(matrix)

    resident_compare = resident.compare_with_cpu
    monkeypatch.setattr(resident, "compare_with_cpu", compare)
    first, second = matrix_of(kind), matrix_of(kind, seed=1)
    other = matrix_of("columns" if kind == "rows" else "rows")
    for matrix in (first, first, second, other):
        assert torch.equal(decode(matrix), dense(matrix))
    assert compared == [first, other]


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("wrong", ["all", "an outlier"])
def test_other_weights_than_the_cpu(
    kind: str, wrong: str, decoder: CudaKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels that work on another matrix: with other weights, or with another outlier alone."""
    matrix = matrix_of(kind)
    other = matrix_of(kind, seed=1) if wrong == "all" else matrix_of(kind, 61.0)
    index = resident.index_matrix
    monkeypatch.setattr(resident, "index_matrix", lambda matrix, launch: index(other, launch))
    with pytest.warns(RuntimeWarning, match=r"\(CUDA kernels\) on cpu returns other weights"):
        assert torch.equal(decode(matrix), dense(matrix))
    assert torch.equal(decode(matrix), dense(matrix))  # and no second warning
    with (
        use_decoder("ectcq", "cuda"),
        pytest.raises(DecoderError, match="returns other weights than the CPU"),
    ):
        decode(matrix)
    # Once the cause is gone, another try succeeds.
    monkeypatch.setattr(resident, "index_matrix", index)
    with use_decoder("ectcq", "cuda"):
        assert torch.equal(decode(matrix), dense(matrix))


def test_an_outlier_alone_differs() -> None:
    """That the matrices of the test above differ in one weight."""
    differences = dense(matrix_of("rows")) != dense(matrix_of("rows", 61.0))
    assert differences.sum() == 1
    assert differences[0, 0]


@pytest.mark.parametrize("when", ["loading", "indexing", "using"])
def test_kernels_that_cannot_be_started(
    when: str, launch: Launch, decoder: CudaKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = matrix_of("rows")

    def fail(*arguments: object, **more: object) -> None:
        raise DecoderError("CUDA error 701")

    if when == "loading":
        monkeypatch.setattr(gpu, "kernels", fail)
    elif when == "indexing":
        monkeypatch.setattr(gpu, "kernels", lambda index: fail)
    else:
        made = decoder.resident(matrix, CPU)
        monkeypatch.setattr(made, "_launch", fail)
    with pytest.warns(RuntimeWarning, match="decoded on the CPU and uploaded: CUDA error 701"):
        assert torch.equal(decode(matrix), dense(matrix))
    assert torch.equal(decode(matrix), dense(matrix))  # and no second warning


def test_a_lost_device_is_no_reason_for_the_cpu(
    decoder: CudaKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise RuntimeError("CUDA error 700")

    monkeypatch.setattr(gpu, "kernels", lambda index: fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="CUDA error 700"):
            decode(matrix_of("rows"))


def test_a_bitstream_that_is_too_large_is_refused() -> None:
    weight = CodecTensor.from_hp(torch.randn(64, 64), codec_weight_only("ectcq", bits=3))
    matrix = open_matrix(*weight.coded)
    window, device = Window(0, 64, 0, 64), torch.device("cpu")
    assert CudaKernels().refusal(matrix, window, device) is None
    large = dataclasses.replace(matrix, header=dataclasses.replace(matrix.header, total_size=2**32))
    reason = CudaKernels().refusal(large, window, device)
    assert reason == "its bitstream has 4294967296 bytes: allowed: at most 4294967295"
