"""One file of the output, put together from finished tensors and from what is copied."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchcodec_weights.convert.parts import PIECE, Part
from torchcodec_weights.convert.plan import PlannedFile
from torchcodec_weights.convert.source import Source
from torchcodec_weights.format.container import Crc32c
from torchcodec_weights.format.layout import table_of_strings
from torchcodec_weights.format.safetensors import StoredTensor, file_header, stored_order


@dataclass(frozen=True)
class Done:
    """A file of the output that is whole.

    Attributes:
        size: of the file, in bytes.
        encoded: names of its weights to the SHA-256 of their bytes in the source, and of what they
            decode to ("" where they stay dense).
        copied: names of its other tensors to the CRC-32C of their bytes.
    """

    size: int
    encoded: dict[str, tuple[str, str]]
    copied: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """As JSON; `from_json` is the inverse."""
        return {"size": self.size, "encoded": self.encoded, "copied": self.copied}

    @classmethod
    def from_json(cls, table: Any) -> "Done":
        """Raises LookupError, TypeError or ValueError if it is none."""
        encoded = {name: (str(a), str(b)) for name, (a, b) in table["encoded"].items()}
        return cls(int(table["size"]), encoded, dict(table["copied"]))


def write_shard(
    path: Path,
    source: Source,
    file: PlannedFile,
    parts: Mapping[str, Part],
    listed: list[str],
    marks: Mapping[str, str],
) -> Done:
    """Write one file of the output, and flush it to the device.

    Args:
        path: to write.
        source: what is not encoded is copied from there, a few megabytes at a time.
        file: of the source.
        parts: its finished tensors, by name.
        listed: names of the encoded tensors of all files, which each file lists.
        marks: further entries of its table of strings.

    Raises:
        ValueError: two tensors would have one name.
        OSError: the source cannot be read, or the file not written.
    """
    inner: dict[str, tuple[Part, StoredTensor]] = {
        key: (part, tensor) for part in parts.values() for key, tensor in part.tensors.items()
    }
    dense = {
        name: tensor
        for name, tensor in file.header.tensors.items()
        if name not in parts or not parts[name].tensors
    }
    if clash := inner.keys() & dense.keys():
        raise ValueError(f"{source.text}: the name {min(clash)!r} would be used twice")
    stored = {**dense, **{key: tensor for key, (_, tensor) in inner.items()}}
    sizes = {name: (tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in stored.items()}
    checksums = dict.fromkeys(sorted(dense), "0" * 8)

    def header() -> bytes:
        return file_header(
            sizes,
            table_of_strings(
                file.header.strings,
                listed,
                {name: part.entry for name, part in parts.items()},
                {name: part.decoded_sha256 for name, part in parts.items() if part.tensors},
                checksums,
                marks,
            ),
        )

    with path.open("wb") as out:
        out.write(header())
        for name in stored_order(sizes):
            if name in dense:
                checksums[name] = f"{_copy_tensor(source, file.name, dense[name], out):08x}"
            else:
                part, tensor = inner[name]
                _copy_bytes(part.path, tensor, out)
        size = out.tell()
        out.seek(0)
        out.write(header())  # of the same length, with the checksums
        out.flush()
        os.fsync(out.fileno())
    encoded = {name: (part.source_sha256, part.decoded_sha256) for name, part in parts.items()}
    return Done(size, encoded, checksums)


def _copy_tensor(source: Source, file: str, tensor: StoredTensor, out: Any) -> int:
    buffer = memoryview(bytearray(min(PIECE, tensor.nbytes)))
    crc = Crc32c()
    for start in range(tensor.start, tensor.end, PIECE):
        piece = buffer[: min(PIECE, tensor.end - start)]
        source.read(file, start, piece)
        crc.update(piece)
        out.write(piece)
    return crc.value


def checksum_of_source(source: Source, file: str, tensor: StoredTensor) -> str:
    """CRC-32C of a tensor's bytes in the source, as `Done.copied` has it."""
    crc = Crc32c()
    for start in range(tensor.start, tensor.end, PIECE):
        piece = memoryview(bytearray(min(PIECE, tensor.end - start)))
        source.read(file, start, piece)
        crc.update(piece)
    return f"{crc.value:08x}"


def _copy_bytes(path: Path, tensor: StoredTensor, out: Any) -> None:
    with path.open("rb") as file:
        file.seek(tensor.start)
        left = tensor.nbytes
        while left:
            piece = file.read(min(PIECE, left))
            if not piece:
                raise OSError(f"{path} is cut short")
            out.write(piece)
            left -= len(piece)


def read_done(path: Path) -> Done | None:
    """The record of a file that is whole, or None."""
    try:
        return Done.from_json(json.loads(path.read_bytes()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
