"""What the headers of safetensors files say of the weights in them, read without PyTorch.

Of a weight its attributes, the header of its container and its scales are read, and checked as
where a CodecTensor is made of them; of other tensors only the sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from torchcodec_weights.codecs.names import BUILT_IN
from torchcodec_weights.codecs.registry import codec_info
from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.container import MAGIC, Header
from torchcodec_weights.format.dtypes import DTYPE_CODES, FloatDtype
from torchcodec_weights.format.layout import Reader
from torchcodec_weights.format.safetensors import DTYPE_NAMES, StoredTensor, read_header
from torchcodec_weights.matrix.checks import (
    ARRAYS,
    check_attributes,
    check_binding,
    check_header,
    named,
    refused_array,
)
from torchcodec_weights.matrix.geometry import refused_geometry, resolved_window
from torchcodec_weights.models.table import Table, WeightReport
from torchcodec_weights.system.files import read_ahead

_DTYPES = {name: FloatDtype(name) for name in DTYPE_CODES}


@dataclass(frozen=True, eq=False)
class StoredPart:
    """A plain tensor in a file.

    Attributes:
        path: of the file.
        tensor: its place there.
    """

    path: Path
    tensor: StoredTensor

    def read(self, count: int | None = None) -> bytes:
        """All bytes of the tensor, or as many of the first as there are.

        Raises:
            OSError: the file cannot be read.
            CodecError: it is shorter than when its header was read.
        """
        size = self.tensor.nbytes if count is None else min(count, self.tensor.nbytes)
        with self.path.open("rb") as file:
            file.seek(self.tensor.start)
            data = file.read(size)
        if len(data) < size:
            raise CodecError(f"{self.path} was cut short while it was read")
        return data

    @property
    def dtype(self) -> str:
        """Name of its dtype, as PyTorch has it."""
        return DTYPE_NAMES[self.tensor.dtype]


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight whose header and attributes have been read and checked.

    Attributes:
        header: of its container.
        window: first row, rows, first column and columns of the matrix that it consists of.
        dtype: name of its dtype.
        stored_bytes: bytes of all its parts.
    """

    header: Header
    window: list[int]
    dtype: str
    stored_bytes: int


def header_table(files: Sequence[Path], source: Path) -> Table | None:
    """The table of the encoded weights in safetensors files.

    It is the one that `report_tensors` makes of the loaded tensors; a weight with several names
    counts once.

    Args:
        files: of one model.
        source: the file or directory, for messages.

    Returns:
        The table; None where PyTorch has to read the files: one has dtypes that this package does
        not name, or a header that only `safetensors` reads.

    Raises:
        CodecError: a file or a weight is refused; the first is named.
        OSError: a file cannot be read.
    """
    plain: dict[str, StoredPart] = {}
    strings: dict[str, str] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                names = opened.keys()
                strings.update(opened.metadata() or {})
        except safetensors.SafetensorError as error:
            raise CodecError(f"{file} cannot be read as safetensors: {error}") from None
        try:
            header = read_header(file)
        except CodecError:
            return None
        if header.tensors.keys() != set(names):
            return None
        if not {tensor.dtype for tensor in header.tensors.values()} <= DTYPE_NAMES.keys():
            return None
        read_ahead(file, header.beginnings())
        plain.update((name, StoredPart(file, header.tensors[name])) for name in names)
    found: dict[str, StoredPart | StoredWeight] = {}
    reader = Reader(_DTYPES, _weight, _first_bytes)
    for name, tensor in reader.weights(plain, strings, source):
        if isinstance(tensor, CodecError):
            raise tensor
        found[name] = tensor
    return _table({**found, **plain})


def _weight(attributes: dict[str, Any]) -> StoredWeight:
    """Read and check a weight, as `CodecTensor.check` does."""
    binding = attributes.get("binding")
    check_binding(binding)
    try:
        return _checked(attributes, binding)
    except CodecError as error:
        if binding is None:
            raise
        raise named(error, binding) from None


def _checked(attributes: dict[str, Any], binding: list[str] | None) -> StoredWeight:
    shape, dtype = attributes["logical_shape"], attributes["logical_dtype"]
    window, transposed = attributes.get("window"), attributes.get("transposed")
    reason = refused_geometry(shape, dtype, window, transposed, _DTYPES.values())
    if reason:
        raise CodecError(reason)
    parts: dict[str, StoredPart] = {name: attributes[name] for name in ARRAYS if name in attributes}
    for name, part in parts.items():
        if len(part.tensor.shape) != 1 or part.dtype != ARRAYS[name]:
            kind = f"torch.strided, torch.{part.dtype}"
            raise CodecError(refused_array(name, kind, part.tensor.shape))
    qdata = parts["qdata"]
    header, _ = check_header(
        qdata.read,
        qdata.tensor.nbytes,
        parts["scale"].read(),
        parts["zero_point"].read() if "zero_point" in parts else None,
        parts["act_pre_scale"].read(),
    )
    check_attributes(header, shape, window, transposed, binding)
    stored = sum(part.tensor.nbytes for part in parts.values())
    return StoredWeight(header, resolved_window(shape, window, transposed), dtype.name, stored)


def _first_bytes(part: StoredPart) -> bytes | None:
    if part.dtype != "uint8" or len(part.tensor.shape) != 1:
        return None
    return part.read(len(MAGIC))


def _table(tensors: dict[str, StoredPart | StoredWeight]) -> Table:
    weights: list[WeightReport] = []
    other_bytes = 0
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if isinstance(tensor, StoredPart):
            other_bytes += tensor.tensor.nbytes
            continue
        header = tensor.header
        weights.append(
            WeightReport.of(
                name,
                header,
                tensor.window,
                tensor.dtype,
                tensor.stored_bytes,
                _decoder(header.codec),
            )
        )
    return Table(tuple(weights), other_bytes)


def _decoder(codec: str) -> str:
    """Name of the decoder of an available codec for the CPU."""
    if codec in BUILT_IN:  # which bring no second decoder for the CPU
        return codec_info(codec).decoders["cpu"]
    import torch

    from torchcodec_weights.decoders.choice import decoder_name

    return decoder_name(codec, torch.device("cpu"))
