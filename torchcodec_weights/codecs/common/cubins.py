"""Machine code of CUDA C++ (cubins): compiled once, kept on disk, and its kernels' names.

A cubin is kept in `$XDG_CACHE_HOME/torchcodec-weights`, or in `~/.cache/torchcodec-weights`. Its
name there is a hash of all that it is made from, so nothing is ever out of date. What cannot be
read is compiled anew, and what cannot be written is not kept.
"""

import os
import struct
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from torchcodec_weights.codecs.common import nvrtc
from torchcodec_weights.system import files

_OPTIONS = ("-std=c++17",)


def compile_source(source: str, architecture: str) -> bytes:
    """Machine code of CUDA C++, from the cache if it is there.

    Args:
        architecture: "sm_90" for compute capability 9.0.

    Returns:
        A cubin, an ELF file.

    Raises:
        DecoderError: there is no NVRTC, or the source does not compile, or not for this
            architecture; the compiler's log is in the message.
    """
    options = (f"--gpu-architecture={architecture}", *_OPTIONS)
    path = _path(source, options)
    cubin = None if path is None else _read(path)
    if cubin is None:
        cubin = nvrtc.compile_cubin(source, options)
        if path is not None:
            _write(path, cubin)
    return cubin


def _folder() -> Path | None:
    """Where cubins are kept; None if this user has no such folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # A path that is not absolute is to be ignored (XDG Base Directory Specification).
        cache = cache if cache.is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # there is no home directory
        return None
    return cache / "torchcodec-weights"


def _path(source: str, options: tuple[str, ...]) -> Path | None:
    folder = _folder()
    if folder is None:
        return None
    parts = ("{}.{}".format(*nvrtc.version()), *options, source)
    return folder / f"{sha256(chr(0).join(parts).encode()).hexdigest()}.cubin"


_DIGEST_BYTES = sha256().digest_size


def _read(path: Path) -> bytes | None:
    """A cubin that `_write` wrote; None if it is not there or damaged."""
    try:
        contents = path.read_bytes()
    except OSError:
        return None
    digest, cubin = contents[:_DIGEST_BYTES], contents[_DIGEST_BYTES:]
    return cubin if sha256(cubin).digest() == digest else None


def _write(path: Path, cubin: bytes) -> None:
    with suppress(OSError):  # a disk that is full, a home directory that cannot be written
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.replace(path, sha256(cubin).digest() + cubin)


_SECTION_TEXT = ".text."


def kernel_names(cubin: bytes) -> list[str]:
    """Names of the kernels of a cubin: each has a section of its own, `.text.` and its name.

    The driver lists them only from CUDA 12.4 on.

    Args:
        cubin: as NVRTC makes it, an ELF file of 64 bits, little-endian.
    """
    (table,) = struct.unpack_from("<Q", cubin, 40)  # e_shoff
    entry_size, count, names = struct.unpack_from("<HHH", cubin, 58)  # e_shentsize and on
    entries = range(table, table + entry_size * count, entry_size)
    (text,) = struct.unpack_from("<Q", cubin, entries[names] + 24)  # sh_offset
    found = []
    for entry in entries:
        start = text + struct.unpack_from("<I", cubin, entry)[0]  # sh_name
        name = cubin[start : cubin.index(0, start)].decode()
        if name.startswith(_SECTION_TEXT):
            found.append(name.removeprefix(_SECTION_TEXT))
    return found
