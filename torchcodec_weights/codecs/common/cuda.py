"""CUDA C++ compiled at its first use by NVRTC, through cuda-core, and cached on disk.

Neither nvcc nor a CUDA toolkit is needed. cuda-core caches machine code in the user's cache folder
(`$XDG_CACHE_HOME/cuda-python/program-cache`), by source, options and compiler version.
"""

import threading
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from torchcodec_weights.errors import CodecError

INSTALL = "cuda-core is not installed: pip install 'torchcodec-weights[cuda]'"


class Launch(Protocol):
    """Starts kernels; `Kernels` starts them on a GPU."""

    def __call__(self, kernel: str, blocks: int, threads: int, *arguments: int) -> None:
        """Start a kernel whose parameters are all of 64 bits: integers and addresses."""


def missing() -> str | None:
    """Why kernels cannot be compiled and run here, or None if they can."""
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return _cannot_compile()


@cache
def _cannot_compile() -> str | None:
    try:
        from cuda.bindings import nvrtc
        from cuda.core.utils import FileStreamProgramCache  # noqa: F401 - since cuda-core 1.2
    except ImportError:
        return INSTALL
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the library itself is loaded with the first call
        return f"NVRTC cannot be loaded ({error}): pip install 'torchcodec-weights[cuda]'"
    return None


def compile_source(source: str, architecture: str) -> Any:
    """Machine code of CUDA C++ for an architecture ("sm_90"), a `cuda.core.ObjectCode`.

    Raises:
        cuda.core errors: the source does not compile, or not for this architecture.
    """
    from cuda.core import Program, ProgramOptions
    from cuda.core.utils import FileStreamProgramCache

    program = Program(source, "c++", ProgramOptions(std="c++17", arch=architecture))
    try:
        with FileStreamProgramCache() as kept:
            return program.compile("cubin", cache=kept)
    except OSError:  # for example a home directory that cannot be written
        return program.compile("cubin")


@cache
def _stream(handle: int) -> Any:
    """cuda-core's object for a stream of PyTorch; making one takes longer than a launch."""
    from cuda.core import LEGACY_DEFAULT_STREAM, Stream

    return Stream.from_handle(handle) if handle else LEGACY_DEFAULT_STREAM


class Kernels:
    """The kernels of a source file on one device.

    Args:
        path: of CUDA C++ with `extern "C"` kernels.
        device: index of the device.
    """

    def __init__(self, path: Path, device: int) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        self._code = compile_source(path.read_text(), f"sm_{major}{minor}")
        self._device = device
        self._kernels: dict[str, Any] = {}
        self._threads = threading.local()

    def __call__(self, kernel: str, blocks: int, threads: int, *arguments: int) -> None:
        """Start a kernel on PyTorch's current stream of the device."""
        from cuda.core import Device, LaunchConfig, launch

        with torch.cuda.device(self._device):
            if not hasattr(self._threads, "ready"):
                # A new thread has no current context of the device.
                Device(self._device).set_current()
                self._threads.ready = True
            if kernel not in self._kernels:
                self._kernels[kernel] = self._code.get_kernel(kernel)
            stream = _stream(torch.cuda.current_stream().cuda_stream)
            launch(stream, LaunchConfig(blocks, block=threads), self._kernels[kernel], *arguments)


def capturing(device: torch.device) -> bool:
    """Whether the current stream of a device records a CUDA graph."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def refuse_first_use(device: torch.device) -> None:
    """Reject a weight's first use, which needs the host, while a CUDA graph is captured.

    Raises:
        CodecError: one is captured on the device.
    """
    if capturing(device):
        raise CodecError(
            "a weight is used for the first time while a CUDA graph is captured, and is checked on "
            "the host: run the model once before"
        )
