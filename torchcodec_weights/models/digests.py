"""Hashes of what a file holds, to compare with those that `compress` stored in it."""

import hashlib
from pathlib import Path

from torch import Tensor

from torchcodec_weights.encoder.decoded import decode_bands
from torchcodec_weights.format.container import Crc32c
from torchcodec_weights.format.layout import stored_hashes
from torchcodec_weights.format.safetensors import read_header
from torchcodec_weights.matrix.opened import open_matrix
from torchcodec_weights.models.checkpoint import raw_bytes
from torchcodec_weights.tensor import CodecTensor

_PIECE = 2**22  # bytes


def decoded_digest(weight: CodecTensor) -> str:
    """SHA-256 of the bytes that a weight's matrix decodes to in its own dtype, row by row.

    Raises:
        CodecError: its bitstream is corrupt.
    """
    digest = hashlib.sha256()
    for _, rows in decode_bands(open_matrix(*weight.coded), weight.dtype):
        digest.update(raw_bytes(rows))
    return digest.hexdigest()


def checksum(tensor: Tensor) -> str:
    """CRC-32C of the bytes of a plain tensor, in hexadecimal."""
    data = raw_bytes(tensor)
    crc = Crc32c()
    for start in range(0, len(data), _PIECE):
        crc.update(data[start : start + _PIECE])
    return f"{crc.value:08x}"


class Hashes:
    """The hashes that safetensors files hold.

    Attributes:
        decoded: of encoded weights, by name.
        checksums: of other tensors, by name.
    """

    def __init__(self, files: list[Path]) -> None:
        self.decoded: dict[str, str] = {}
        self.checksums: dict[str, str] = {}
        for file in files:
            decoded, checksums = stored_hashes(read_header(file).strings)
            self.decoded.update(decoded)
            self.checksums.update(checksums)

    def error_of(self, name: str, tensor: Tensor, *, decode: bool) -> str | None:
        """What is wrong with a tensor; None if nothing is, or no hash of it is known.

        Raises:
            CodecError: its bitstream is corrupt.
        """
        if not isinstance(tensor, CodecTensor):
            known = self.checksums.get(name)
            found = known and checksum(tensor)
            return None if found == known else f"its CRC-32C is {found}, and was {known}"
        known = self.decoded.get(name) if decode else None
        if known is None:
            if decode:
                tensor.dequantize()
            return None
        found = decoded_digest(tensor)
        if found == known:
            return None
        return f"what it decodes to has the SHA-256 {found}, and had {known}"
