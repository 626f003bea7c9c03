"""Kernels loaded and started through the driver, on a GPU."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_cuda_driver import SOURCE

from torchcodec_weights.codecs.common import cuda
from torchcodec_weights.codecs.common.cuda import Kernels
from torchcodec_weights.errors import DecoderError

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=f"{cuda.missing()}")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    path = tmp_path_factory.mktemp("source") / "kernels.cu"
    path.write_text(SOURCE)
    return Kernels(path, torch.cuda.current_device())


def test_kernels_of_a_source(kernels: Kernels) -> None:
    assert sorted(kernels.names) == ["fill", "next", "turned"]
    taken = kernels.resources("fill")
    assert 8 <= taken.registers <= 255
    assert taken.local_bytes == taken.shared_bytes == 0


def test_more_shared_memory_than_without_asking(kernels: Kernels) -> None:
    properties = torch.cuda.get_device_properties()
    most = properties.shared_memory_per_block_optin // 8
    numbers = torch.randint(2**62, (most,), device="cuda")
    out = torch.zeros_like(numbers)
    kernels("turned", 1, 256, out.data_ptr(), numbers.data_ptr(), most, shared=8 * most)
    assert torch.equal(out, numbers.flip(0))


def test_kernels_that_overlap(kernels: Kernels) -> None:
    first = torch.zeros(1 << 22, dtype=torch.int64, device="cuda")
    last = torch.zeros(1 << 10, dtype=torch.int64, device="cuda")
    for value in range(1, 50):
        kernels("fill", 1000, 256, first.data_ptr(), len(first), value)
        kernels("next", 1, 256, last.data_ptr(), first[-1024:].data_ptr(), 1024, programmatic=True)
        assert (last == value + 1).all()


def test_threads_and_streams(kernels: Kernels) -> None:
    def work(number: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            out = torch.zeros(1 << 16, dtype=torch.int64, device="cuda")
            for value in range(200):
                kernels("fill", 4, 256, out.data_ptr(), len(out), 1000 * number + value)
            return bool((out == 1000 * number + 199).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(32)))


def test_a_thread_that_has_not_used_cuda(kernels: Kernels) -> None:
    out = torch.zeros(1000, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(kernels, "fill", 1, 32, out.data_ptr(), 1000, 5).result()
    torch.cuda.synchronize()
    assert (out == 5).all()


def test_errors_that_the_device_survives(kernels: Kernels) -> None:
    out = torch.zeros(1000, dtype=torch.int64, device="cuda")
    with pytest.raises(DecoderError, match="fill with 1 blocks of 4096 threads: CUDA error"):
        kernels("fill", 1, 4096, out.data_ptr(), 1000, 5)
    with pytest.raises(DecoderError, match="allowed: "):
        kernels("no_such_kernel", 1, 32)
    kernels("fill", 1, 32, out.data_ptr(), 1000, 6)
    assert (out == 6).all()


def test_a_captured_graph(kernels: Kernels) -> None:
    out = torch.zeros(1000, dtype=torch.int64, device="cuda")
    other = torch.zeros_like(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels("fill", 1, 32, out.data_ptr(), 1000, 7)
        kernels("next", 1, 32, other.data_ptr(), out.data_ptr(), 1000, programmatic=True)
    assert (out == 0).all()
    graph.replay()
    assert (out == 7).all()
    assert (other == 8).all()
