"""NVRTC, NVIDIA's compiler of CUDA C++ as a library: where it lies, and a call of it.

PyTorch's wheels for CUDA bring it; neither nvcc nor a CUDA toolkit is needed.
"""

import ctypes
import importlib.util
from collections.abc import Iterator
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from functools import cache
from pathlib import Path

import torch

from torchcodec_weights.errors import DecoderError

_MAJORS = 13, 12
"""Where PyTorch was built without CUDA, as where kernels are only compiled to look at them."""

_SIGNATURES = {
    "nvrtcVersion": (POINTER(c_int), POINTER(c_int)),
    "nvrtcCreateProgram": (
        POINTER(c_void_p),
        c_char_p,
        c_char_p,
        c_int,
        POINTER(c_char_p),
        POINTER(c_char_p),
    ),
    "nvrtcCompileProgram": (c_void_p, c_int, POINTER(c_char_p)),
    "nvrtcGetProgramLogSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetProgramLog": (c_void_p, c_char_p),
    "nvrtcGetCUBINSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetCUBIN": (c_void_p, c_char_p),
    "nvrtcDestroyProgram": (POINTER(c_void_p),),
}


def _majors() -> tuple[int, ...]:
    """Versions of CUDA whose machine code can be loaded here: PyTorch's, as it chose the driver."""
    version = torch.version.cuda
    return _MAJORS if version is None else (int(version.partition(".")[0]),)


def _candidates() -> Iterator[str]:
    """Names of the library, the best first."""
    spec = importlib.util.find_spec("nvidia")
    folders = () if spec is None else spec.submodule_search_locations or ()
    for major in _majors():
        soname = f"libnvrtc.so.{major}"
        yield soname  # one that is loaded already, or that the system has
        for folder in folders:
            for wheel in (f"cu{major}", "cuda_nvrtc"):
                path = Path(folder, wheel, "lib", soname)
                if path.exists():
                    yield str(path)


@cache
def _library() -> ctypes.CDLL:
    """The library, its functions typed.

    Raises:
        DecoderError: it cannot be loaded; says what to install.
    """
    failures = []
    for name in _candidates():
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            failures.append(str(error))
            continue
        for function, arguments in _SIGNATURES.items():
            getattr(library, function).argtypes = arguments
        library.nvrtcGetErrorString.argtypes = (c_int,)
        library.nvrtcGetErrorString.restype = c_char_p
        return library
    major = _majors()[0]
    package = "nvidia-cuda-nvrtc" + (f"-cu{major}" if major < 13 else "")
    raise DecoderError(
        f"NVRTC cannot be loaded ({'; '.join(failures)}): pip install '{package}=={major}.*'"
    )


@cache
def missing() -> str | None:
    """What to install so that kernels can be compiled here, or None if they can."""
    try:
        _library()
    except DecoderError as error:
        return str(error)
    return None


def version() -> tuple[int, int]:
    """Major and minor version of CUDA that the compiler is of.

    Raises:
        DecoderError: there is no NVRTC.
    """
    major, minor = c_int(), c_int()
    _call("nvrtcVersion", byref(major), byref(minor))
    return major.value, minor.value


def compile_cubin(source: str, options: tuple[str, ...]) -> bytes:
    """Machine code of CUDA C++, an ELF file.

    Args:
        options: of NVRTC, the architecture among them: "--gpu-architecture=sm_90".

    Raises:
        DecoderError: there is no NVRTC, or the source does not compile; it has the compiler's log.
    """
    program = c_void_p()
    _call("nvrtcCreateProgram", byref(program), source.encode(), b"kernels.cu", 0, None, None)
    try:
        encoded = (c_char_p * len(options))(*(option.encode() for option in options))
        try:
            _call("nvrtcCompileProgram", program, len(options), encoded)
        except DecoderError as error:
            log = _read("nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program)
            text = log.rstrip(b"\0").decode(errors="replace").strip()
            raise DecoderError(f"{error} with {' '.join(options)}:\n{text}") from None
        return _read("nvrtcGetCUBINSize", "nvrtcGetCUBIN", program)
    finally:
        _call("nvrtcDestroyProgram", byref(program))


def _read(size_of: str, read: str, program: c_void_p) -> bytes:
    size = c_size_t()
    _call(size_of, program, byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    _call(read, program, buffer)
    return buffer.raw


def _call(function: str, *arguments: object) -> None:
    library = _library()
    code = getattr(library, function)(*arguments)
    if code:
        raise DecoderError(f"{function}: {library.nvrtcGetErrorString(code).decode()}")
