"""NVIDIA's driver, as far as kernels are loaded and started by it: libcuda, which PyTorch uses too.

PyTorch's context of a device, its primary one, is used, and streams and memory are PyTorch's.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_uint64, c_void_p
from functools import cache
from typing import Any, NamedTuple

from torchcodec_weights.errors import DecoderError

# CUfunction_attribute and CUdevice_attribute of cuda.h.
_STATIC_SHARED, _LOCAL, _REGISTERS, _MAX_DYNAMIC_SHARED = 1, 3, 4, 8
_MAX_SHARED_OPTIN, _CAPABILITY_MAJOR = 97, 75

_PROGRAMMATIC_STREAM_SERIALIZATION = 6

_CONTEXT_LOST = frozenset({4, 214, 220, 226, 700, 702, 709, 710, *range(714, 720), 721, 999})
"""Errors after which every call fails: by a kernel that was started before, or by the hardware."""


class _AttributeValue(ctypes.Union):
    _fields_ = (("pad", ctypes.c_char * 64), ("allowed", c_int))


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", c_int), ("pad", ctypes.c_char * 4), ("value", _AttributeValue))


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid_x", c_uint),
        ("grid_y", c_uint),
        ("grid_z", c_uint),
        ("block_x", c_uint),
        ("block_y", c_uint),
        ("block_z", c_uint),
        ("shared_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", POINTER(_Attribute)),
        ("attribute_count", c_uint),
    )


_SIGNATURES = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncGetAttribute": (POINTER(c_int), c_int, c_void_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernelEx": (
        POINTER(_LaunchConfig),
        c_void_p,
        POINTER(c_void_p),
        POINTER(c_void_p),
    ),
}


@cache
def _library() -> ctypes.CDLL:
    """The library, its functions typed.

    Raises:
        DecoderError: there is no driver.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DecoderError(f"NVIDIA's driver cannot be loaded: {error}") from None
    for function, arguments in _SIGNATURES.items():
        getattr(library, function).argtypes = arguments
    return library


def check(call: str, code: int) -> None:
    """Raise what a call's result stands for.

    Raises:
        DecoderError: the call failed, and others may work.
        RuntimeError: the context is lost, so that no use of the device can work in this process.
    """
    if not code:
        return
    name, text = c_char_p(), c_char_p()
    _library().cuGetErrorName(code, byref(name))
    _library().cuGetErrorString(code, byref(text))
    meaning = b"%s, %s" % (name.value or b"unknown error", text.value or b"unknown to this driver")
    message = f"{call}: CUDA error {code} ({meaning.decode()})"
    if code in _CONTEXT_LOST:
        raise RuntimeError(
            f"{message}. This process can use the device no more; with CUDA_LAUNCH_BLOCKING=1 the "
            "error is reported where it arises, by whatever kernel"
        )
    raise DecoderError(message)


def _call(function: str, *arguments: object) -> None:
    check(function, getattr(_library(), function)(*arguments))


class Resources(NamedTuple):
    """What a kernel takes.

    Attributes:
        registers: of each thread.
        local_bytes: of each thread, in device memory: registers that did not fit, and arrays.
        shared_bytes: of each block, without what a launch adds.
    """

    registers: int
    local_bytes: int
    shared_bytes: int


class Context:
    """PyTorch's context of a device.

    Args:
        device: index, as PyTorch and CUDA_VISIBLE_DEVICES number them.

    Raises:
        DecoderError: there is no driver, or no such device.
    """

    def __init__(self, device: int) -> None:
        _call("cuInit", 0)
        self._device, self.handle = c_int(), c_void_p()
        _call("cuDeviceGet", byref(self._device), device)
        # Never released: kernels are needed until the process ends.
        _call("cuDevicePrimaryCtxRetain", byref(self.handle), self._device)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes the context that of the thread. A new thread has none, and others another's."""
        _call("cuCtxPushCurrent_v2", self.handle)
        try:
            yield
        finally:
            _call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def _attribute(self, attribute: int) -> int:
        value = c_int()
        _call("cuDeviceGetAttribute", byref(value), attribute, self._device)
        return value.value

    def load(self, cubin: bytes, names: list[str]) -> "Module":
        """Load machine code and the kernels of these names.

        Raises:
            DecoderError: it is not for this device, or a kernel is not in it.
        """
        optin = self._attribute(_MAX_SHARED_OPTIN)
        overlaps = self._attribute(_CAPABILITY_MAJOR) >= 9
        with self.current():
            module = c_void_p()
            _call("cuModuleLoadData", byref(module), cubin)
            functions = {name: _load_function(module, name, optin) for name in names}
        return Module(self, functions, overlaps)


def _load_function(module: c_void_p, name: str, optin: int) -> c_void_p:
    """A kernel that may be started with all shared memory that a block of the device can have.

    Args:
        optin: how many bytes that is; without asking for them it is 48 KiB.
    """
    function = c_void_p()
    _call("cuModuleGetFunction", byref(function), module, name.encode())
    if hasattr(_library(), "cuFuncLoad"):  # CUDA 12.4
        # Code is loaded at the first use otherwise, which cannot be while a graph is captured.
        _library().cuFuncLoad.argtypes = (c_void_p,)
        _call("cuFuncLoad", function)
    static = c_int()
    _call("cuFuncGetAttribute", byref(static), _STATIC_SHARED, function)
    _call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, optin - static.value)
    return function


_MAX_ARGUMENTS = 32


class _LaunchMemory(threading.local):
    """What the calls of a launch take by address, made once for each thread: a launch is to take
    microseconds."""

    def __init__(self) -> None:
        self.values: Any = (c_uint64 * _MAX_ARGUMENTS)()
        start = ctypes.addressof(self.values)
        self.addresses = (c_void_p * _MAX_ARGUMENTS)(
            *range(start, start + ctypes.sizeof(self.values), ctypes.sizeof(c_uint64))
        )
        self.attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION)
        self.attribute.value.allowed = 1
        self.config = _LaunchConfig(grid_y=1, grid_z=1, block_y=1, block_z=1)
        self.config.attributes = ctypes.pointer(self.attribute)
        self.config_address = byref(self.config)
        self.popped = byref(c_void_p())


_memory = _LaunchMemory()


class Module:
    """Kernels that are loaded on a device.

    Args:
        context: they are loaded in.
        functions: by name.
        overlaps: whether the device has programmatic dependent launch.
    """

    def __init__(self, context: Context, functions: dict[str, c_void_p], overlaps: bool) -> None:
        self._context, self._functions, self._overlaps = context, functions, overlaps

    @property
    def names(self) -> list[str]:
        """Of all kernels."""
        return list(self._functions)

    def resources(self, kernel: str) -> Resources:
        """What a kernel takes.

        Raises:
            DecoderError: there is no such kernel.
        """
        function, values = self._function(kernel), []
        with self._context.current():
            for attribute in (_REGISTERS, _LOCAL, _STATIC_SHARED):
                value = c_int()
                _call("cuFuncGetAttribute", byref(value), attribute, function)
                values.append(value.value)
        return Resources(*values)

    def _function(self, kernel: str) -> c_void_p:
        if kernel not in self._functions:
            raise DecoderError(f"kernel {kernel!r}: allowed: {', '.join(self._functions)}")
        return self._functions[kernel]

    def launch(
        self,
        stream: int,
        kernel: str,
        blocks: int,
        threads: int,
        arguments: tuple[int, ...],
        shared: int,
        programmatic: bool,
    ) -> None:
        """Start a kernel.

        Args:
            stream: its handle.
            threads: of a block.
            arguments: integers and addresses, all of 64 bits, at most 32.
            shared: bytes of dynamic shared memory of a block.
            programmatic: whether it may start before the kernel before it in the stream has ended;
                it must wait for that itself. Devices before 9.0 do not overlap them.

        Raises:
            DecoderError: it could not be started.
            RuntimeError: an earlier kernel, or the hardware, failed, and the device cannot be used.
        """
        function, library, memory = self._function(kernel), _library(), _memory
        memory.values[: len(arguments)] = arguments
        config = memory.config
        config.grid_x, config.block_x = blocks, threads
        config.shared_bytes, config.stream = shared, stream
        config.attribute_count = int(programmatic and self._overlaps)
        check("cuCtxPushCurrent", library.cuCtxPushCurrent_v2(self._context.handle))
        try:
            code = library.cuLaunchKernelEx(memory.config_address, function, memory.addresses, None)
        finally:
            library.cuCtxPopCurrent_v2(memory.popped)
        if code:
            check(f"{kernel} with {blocks} blocks of {threads} threads", code)
