"""Finished tensors on disk, one file each, until the file that they belong to is put together.

A part is a safetensors file with the inner tensors of a `CodecTensor`, or with none where a weight
stays dense. It has its name when it is whole and on the device, and a hash over its tensors.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.safetensors import (
    StoredTensor,
    file_header,
    read_header,
    stored_order,
)
from torchcodec_weights.system.files import write_durably

PIECE = 2**22
"""Bytes that are copied at a time."""


@dataclass(frozen=True)
class Part:
    """A finished tensor.

    Attributes:
        path: of its file.
        tensors: inner tensors by their names in the output; none where it stays dense.
        entry: of the output's table of strings, JSON.
        source_sha256: of its bytes in the source.
        decoded_sha256: of the decoded weights, of the dtype that they were encoded in; "" where it
            stays dense.
        sha256: of the bytes of its inner tensors.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    entry: str
    source_sha256: str
    decoded_sha256: str
    sha256: str

    @property
    def stored_bytes(self) -> int:
        """Bytes of its inner tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def is_intact(self) -> bool:
        """Whether the bytes of its inner tensors are those that were written."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            file.seek(min([tensor.start for tensor in self.tensors.values()], default=0))
            while self.tensors and (piece := file.read(PIECE)):
                digest.update(piece)
        return digest.hexdigest() == self.sha256


def write_part(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...], memoryview]],
    entry: str,
    source_sha256: str,
    decoded_sha256: str,
) -> None:
    """Write a part.

    Args:
        path: of the file.
        tensors: names to dtype, shape and bytes.
        entry, source_sha256, decoded_sha256: as in `Part`.
    """
    sizes = {name: (dtype, shape, len(data)) for name, (dtype, shape, data) in tensors.items()}
    order = stored_order(sizes)
    digest = hashlib.sha256()
    for name in order:
        digest.update(tensors[name][2])
    strings = {
        "entry": entry,
        "source_sha256": source_sha256,
        "decoded_sha256": decoded_sha256,
        "sha256": digest.hexdigest(),
    }
    pieces = [memoryview(file_header(sizes, strings)), *(tensors[name][2] for name in order)]
    write_durably(path, pieces)


def read_part(path: Path) -> Part | None:
    """A part, without its tensors' bytes; None where there is none that is whole."""
    if not path.is_file():
        return None
    try:
        header = read_header(path)
        if header.total_size != path.stat().st_size:
            return None
        strings = header.strings
        json.loads(strings["entry"])
        return Part(
            path,
            header.tensors,
            strings["entry"],
            strings["source_sha256"],
            strings["decoded_sha256"],
            strings["sha256"],
        )
    except (CodecError, LookupError, ValueError):
        return None
