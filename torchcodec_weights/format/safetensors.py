"""Headers of safetensors files: read from their first bytes, and written the same at every run.

A file is the length of its header in 8 bytes (little-endian), the header as JSON, and the tensors'
bytes without gaps. The package `safetensors` writes the table of strings in the order of a hash
map, which differs from run to run; here everything has one order.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torchcodec_weights.errors import CodecError

LENGTH_BYTES = 8
MAX_HEADER = 100_000_000
"""The most bytes of a header that the package `safetensors` reads."""

DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
"""Dtypes that files hold: their names there to PyTorch's."""

_STRINGS = "__metadata__"
_BEGINNING = 2**16  # bytes of a tensor: more than a container's header, but for 4,000 tiles or more
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        dtype: as the format names it, "BF16" say.
        shape: of the tensor.
        start, end: its bytes, counted from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.end - self.start


@dataclass(frozen=True)
class SafetensorsHeader:
    """What the header of a file says.

    Attributes:
        size: bytes of the file before the first tensor.
        tensors: by name, in the order of their bytes.
        strings: the table of strings.
    """

    size: int
    tensors: dict[str, StoredTensor]
    strings: dict[str, str]

    @property
    def total_size(self) -> int:
        """Bytes of the whole file."""
        return max([tensor.end for tensor in self.tensors.values()], default=self.size)

    def beginnings(self) -> list[tuple[int, int]]:
        """First byte and number of bytes of what opening weights reads of each tensor.

        That is scales, and the headers of containers.
        """
        return [(t.start, min(t.nbytes, _BEGINNING)) for t in self.tensors.values()]


def header_length(first: bytes, what: str) -> int:
    """Bytes of a header, from the first 8 bytes of a file.

    Raises:
        CodecError: the file is too short, or has a header of more than 100 MB.
    """
    length = int.from_bytes(first, "little")
    if len(first) < LENGTH_BYTES or not 2 <= length <= MAX_HEADER:
        raise CodecError(f"{what} is no safetensors file: no header of 2 to {MAX_HEADER} bytes")
    return length


def parse_header(text: bytes, what: str) -> SafetensorsHeader:
    """Read a header, which follows the first 8 bytes of a file.

    Raises:
        CodecError: it is malformed, or tensors do not fill the file from its header on.
    """
    try:
        table = json.loads(text)
        strings = table.pop(_STRINGS, {})
        size = LENGTH_BYTES + len(text)
        tensors = {str(name): _tensor(entry, size) for name, entry in table.items()}
        if not all(isinstance(value, str) for value in strings.values()):
            raise ValueError("the table of strings holds something else")
        tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
        end = size
        for name, tensor in tensors.items():
            if tensor.start != end:
                raise ValueError(f"{name!r} does not follow the tensor before it")
            end = tensor.end
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CodecError(f"{what} has no safetensors header that can be read: {error}") from None
    return SafetensorsHeader(size, tensors, strings)


def read_header(path: Path) -> SafetensorsHeader:
    """The header of a file.

    Raises:
        CodecError: it is malformed.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        length = header_length(file.read(LENGTH_BYTES), str(path))
        return parse_header(file.read(length), str(path))


def _tensor(entry: Any, header: int) -> StoredTensor:
    dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    numbers = (*shape, start, end)
    if not all(type(number) is int and number >= 0 for number in numbers) or dtype not in _BITS:
        raise ValueError(f"dtype {dtype!r}, shape {shape}, bytes {start} to {end}")
    if 8 * (end - start) != _BITS[dtype] * prod(shape):
        raise ValueError(f"{end - start} bytes for {dtype} of shape {shape}")
    return StoredTensor(dtype, shape, header + start, header + end)


def stored_order(tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> list[str]:
    """Names in the order in which tensors are stored: larger dtypes first, then by name.

    So each tensor's bytes are aligned to its dtype, as readers that map the file need.
    """
    return sorted(tensors, key=lambda name: (-_BITS[tensors[name][0]], name))


def file_header(
    tensors: Mapping[str, tuple[str, Sequence[int], int]], strings: Mapping[str, str]
) -> bytes:
    """All bytes of a file before its tensors, which follow in `stored_order`.

    Args:
        tensors: names to dtype, shape and number of bytes.
        strings: the table of strings.
    """
    table: dict[str, Any] = {_STRINGS: dict(sorted(strings.items()))} if strings else {}
    end = 0
    for name in stored_order(tensors):
        dtype, shape, size = tensors[name]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def sorted_header(text: bytes, what: str) -> bytes:
    """A header with the same contents and length whose table of strings is sorted.

    Args:
        text: a header, without the 8 bytes before it.
        what: the file, for messages.

    Raises:
        CodecError: it is malformed.
    """
    parse_header(text, what)
    table = json.loads(text)
    table[_STRINGS] = dict(sorted(table.get(_STRINGS, {}).items()))
    changed = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    if len(changed) > len(text):
        raise CodecError(f"{what}: its header is not written without spaces, as safetensors does")
    return changed.ljust(len(text))
