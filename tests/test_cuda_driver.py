"""What the driver is asked when kernels are loaded and started, without a GPU and a driver."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchcodec_weights.codecs.common import cubins, nvrtc

HERE = Path(__file__).parent

SOURCE = """
extern "C" __global__ void fill(long long* out, long long count, long long value) {
  for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
    out[i] = value;
}
extern "C" __global__ void turned(long long* out, const long long* in, long long count) {
  extern __shared__ long long kept[];
  for (long long i = threadIdx.x; i < count; i += blockDim.x) kept[i] = in[i];
  __syncthreads();
  for (long long i = threadIdx.x; i < count; i += blockDim.x) out[i] = kept[count - 1 - i];
}
extern "C" __global__ void next(long long* out, const long long* in, long long count) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  for (long long i = threadIdx.x; i < count; i += blockDim.x) out[i] = in[i] + 1;
}
"""
"""Kernels that tests/test_gpu_driver.py starts."""

ASKED = """
import os
from torchcodec_weights.codecs.common import driver

def ask():
    module = driver.Context(1).load(b"\\x7fELF machine code", ["kernel_3", "k0"])
    print(module.resources("kernel_3"), flush=True)
    module.launch(0x7F0000000000, "kernel_3", 5, 256, (1, 2**63 - 1, -2), 7000, True)
    module.launch(0, "k0", 1, 32, (), 0, False)

for capability, failing in (
    ("9", ""),
    ("8", ""),
    ("9", "cuInit:100"),
    ("9", "cuDevicePrimaryCtxRetain:2"),
    ("9", "cuModuleLoadData:209"),
    ("9", "cuModuleGetFunction:500"),
    ("9", "cuLaunchKernelEx:701"),
    ("9", "cuLaunchKernelEx:700"),
):
    os.environ |= {"CAPABILITY": capability, "FAIL": failing}
    print(f"[{capability} {failing}]", flush=True)
    try:
        ask()
    except RuntimeError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
"""

ANSWERS = """
[9 ]
device 41 attribute 97
device 41 attribute 75
load kernel_3
kernel_3 attribute 8 is 231448
load k0
k0 attribute 8 is 231448
Resources(registers=4, local_bytes=3, shared_bytes=1000)
kernel_3 grid 5 1 1 block 256 1 1 shared 7000 stream 0x7f0000000000 attribute 6 is 1: 1 {most} -2
k0 grid 1 1 1 block 32 1 1 shared 0 stream (nil):
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What the driver was asked, and the error at the end, with cuda_driver_host.cpp in its place.

    By capability and failing call.
    """
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    if torch.version.cuda is not None:
        pytest.skip("PyTorch needs the driver itself")
    folder = tmp_path_factory.mktemp("driver")
    command = ["g++", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Werror"]
    command += [str(HERE / "cuda_driver_host.cpp"), "-o", str(folder / "libcuda.so.1")]
    subprocess.run(command, check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    command = [sys.executable, "-c", ASKED]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    sections = (section.splitlines() for section in run.stdout.split("[")[1:])
    return {lines[0].rstrip("]"): lines[1:] for lines in sections}


def test_what_the_driver_is_asked(answers: dict[str, list[str]]) -> None:
    lines = ANSWERS.format(most=2**63 - 1).strip().splitlines()[1:]
    assert answers["9 "] == lines
    # Devices before Hopper do not let kernels overlap.
    assert answers["8 "] == [line.replace(" attribute 6 is 1", "") for line in lines]


def test_calls_that_fail(answers: dict[str, list[str]]) -> None:
    for failure in (
        "cuInit:100",
        "cuDevicePrimaryCtxRetain:2",
        "cuModuleLoadData:209",
        "cuModuleGetFunction:500",
    ):
        call, code = failure.split(":")
        assert answers[f"9 {failure}"][-1].startswith(f"DecoderError: {call}: CUDA error {code} (")


def test_kernels_that_are_not_started(answers: dict[str, list[str]]) -> None:
    *_, message = answers["9 cuLaunchKernelEx:701"]
    assert message.startswith("DecoderError: kernel_3 with 5 blocks of 256 threads: CUDA error 701")
    *_, message = answers["9 cuLaunchKernelEx:700"]
    assert message.startswith("RuntimeError: kernel_3 with 5 blocks of 256 threads: CUDA error 700")
    assert "an illegal memory access was encountered" in message
    assert "use the device no more" in message


@pytest.mark.skipif(nvrtc.missing() is not None, reason="needs NVRTC")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_kernels_of_the_gpu_tests_compile(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = cubins.kernel_names(cubins.compile_source(SOURCE, architecture))
    assert sorted(names) == ["fill", "next", "turned"]
