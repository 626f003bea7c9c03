"""One tensor: read, encoded, and written as a part."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from torchcodec_weights.convert.parts import PIECE, write_part
from torchcodec_weights.convert.plan import Task
from torchcodec_weights.convert.source import Source
from torchcodec_weights.encoder.decoded import BAND
from torchcodec_weights.format.dtypes import ITEM_SIZES
from torchcodec_weights.models.checkpoint import FORMAT_DTYPES, flatten, raw_bytes
from torchcodec_weights.models.digests import decoded_digest
from torchcodec_weights.models.quantize import encode_weight

_COPIES = 32  # bytes for each weight among those that are decoded at once


def memory_of(task: Task) -> int:
    """Bytes that encoding a tensor takes at most: the weight, Z, bitstreams, what is decoded."""
    weights = task.weights
    memory = task.stored.nbytes + 5 * weights + _COPIES * min(weights, BAND)
    if FORMAT_DTYPES[task.stored.dtype] != getattr(torch, task.dtype):
        memory += ITEM_SIZES[task.dtype] * weights
    return memory


def read_weight(source: Source, task: Task, rows: int | None = None) -> tuple[Tensor, str]:
    """A tensor, or its first rows, in the dtype of the model; and the SHA-256 of what was read.

    Raises:
        OSError: it cannot be read; names it.
    """
    weight = source.tensor(task.file, task.name, task.stored, rows)
    digest = hashlib.sha256(raw_bytes(weight)).hexdigest()
    return weight.to(getattr(torch, task.dtype)), digest


def digest_of_source(source: Source, task: Task) -> str:
    """SHA-256 of a tensor's bytes in the source; OSError if it cannot be read."""
    digest = hashlib.sha256()
    for start in range(task.stored.start, task.stored.end, PIECE):
        piece = memoryview(bytearray(min(PIECE, task.stored.end - start)))
        source.read(task.file, start, piece)
        digest.update(piece)
    return digest.hexdigest()


def encode_part(source: Source, task: Task, path: Path, encoders: ThreadPoolExecutor) -> None:
    """Read a tensor, encode it, and write it as a part.

    Raises:
        OSError: the tensor cannot be read, or the part not written.
        ValueError: the weight holds NaN or infinity; names it.
        RateError, CodecError: as `encode_weight`.
    """
    weight, digest = read_weight(source, task)
    try:
        coded = encode_weight(weight, task.config, task.name, encoders)
    except ValueError as error:
        if str(error).startswith(f"{task.name}: "):
            raise
        raise ValueError(f"{task.name}: {error}") from None
    del weight
    if coded is None:
        write_part(path, {}, json.dumps({"_type": "Tensor"}), digest, "")
        return
    inner, entry = flatten(task.name, coded)
    data = {
        name: (_FORMAT[tensor.dtype], tuple(tensor.shape), raw_bytes(tensor))
        for name, tensor in inner.items()
    }
    write_part(path, data, json.dumps(entry), digest, decoded_digest(coded))


_FORMAT = {dtype: name for name, dtype in FORMAT_DTYPES.items()}
