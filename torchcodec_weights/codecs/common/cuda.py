"""CUDA C++ that is compiled at its first use, and started on PyTorch's streams.

nvrtc.py has the compiler, cubins.py the cache of what it made, driver.py the driver's functions.
"""

from pathlib import Path
from typing import Protocol

import torch

from torchcodec_weights.codecs.common import cubins, driver, nvrtc
from torchcodec_weights.errors import CodecError


class Launch(Protocol):
    """Starts kernels; `Kernels` starts them on a GPU."""

    def __call__(
        self,
        kernel: str,
        blocks: int,
        threads: int,
        *arguments: int,
        shared: int = 0,
        programmatic: bool = False,
    ) -> None:
        """Start a kernel whose parameters are all of 64 bits: integers and addresses.

        Args:
            threads: of a block.
            shared: bytes of dynamic shared memory of a block.
            programmatic: whether the kernel waits for the one before it in the stream by itself
                (griddepcontrol.wait), so that it may be started before that has ended.
        """


def missing() -> str | None:
    """Why kernels cannot be compiled and run here, or None if they can."""
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return nvrtc.missing()


class Kernels:
    """The kernels of a source file on one device, all of them loaded.

    Args:
        path: of CUDA C++ with `extern "C"` kernels.
        device: index of the device.

    Raises:
        DecoderError: they do not compile for the device, or cannot be loaded there.
        RuntimeError: the device failed before, and cannot be used in this process.
    """

    def __init__(self, path: Path, device: int) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        cubin = cubins.compile_source(path.read_text(), f"sm_{major}{minor}")
        self._module = driver.Context(device).load(cubin, cubins.kernel_names(cubin))
        self._device = device

    def __call__(
        self,
        kernel: str,
        blocks: int,
        threads: int,
        *arguments: int,
        shared: int = 0,
        programmatic: bool = False,
    ) -> None:
        """Start a kernel on PyTorch's current stream of the device.

        Raises:
            DecoderError: it could not be started.
            RuntimeError: the device failed before, and cannot be used in this process.
        """
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._module.launch(stream, kernel, blocks, threads, arguments, shared, programmatic)

    @property
    def names(self) -> list[str]:
        """Of all kernels."""
        return self._module.names

    def resources(self, kernel: str) -> driver.Resources:
        """Registers, local and shared memory that a kernel takes.

        Raises:
            DecoderError: there is no such kernel.
        """
        return self._module.resources(kernel)


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
