"""Safetensors files, and the registration of CodecTensor with torchao and torch.load.

format/layout.py says how the weights lie in them.
"""

import json
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from torchcodec_weights import third_party
from torchcodec_weights.config import CodecWeightOnlyConfig
from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.container import MAGIC, binding_digest, header_bytes
from torchcodec_weights.format.dtypes import dtype_name
from torchcodec_weights.format.layout import NAMES, TIED, Reader, key_of, other_strings
from torchcodec_weights.format.safetensors import (
    DTYPE_NAMES,
    file_header,
    read_header,
    stored_order,
)
from torchcodec_weights.matrix.dtypes import FLOAT_DTYPES
from torchcodec_weights.matrix.opened import as_array
from torchcodec_weights.models.folder import folder_files
from torchcodec_weights.policy import check_names
from torchcodec_weights.system.files import read_ahead, unfinished
from torchcodec_weights.tensor import CodecTensor

FORMAT_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, dtype) for name, dtype in DTYPE_NAMES.items()
}
"""Dtypes by their names in files."""

_NAMES_OF_DTYPES = {dtype: name for name, dtype in FORMAT_DTYPES.items()}
_DTYPES = {dtype_name(dtype): dtype for dtype in FLOAT_DTYPES}


def save_file(
    tensors: Mapping[str, Tensor],
    filename: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save tensors, CodecTensors among them, as a safetensors file.

    Names that share one tensor (tied weights) are stored once, and share it again after
    `load_file`. The file is written under a temporary name and renamed when it is complete.

    Args:
        tensors: names to tensors, as `state_dict()` gives them.
        filename: the file to write.
        metadata: further strings to store.

    Raises:
        ValueError: `tensors` or `metadata` has a wrong type or value, or a name or a key is one
            that this layout uses itself.
    """
    _check_contents(tensors, metadata)
    plain: dict[str, Tensor] = {}
    table: dict[str, str] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        first = seen.setdefault(_identity(tensor), name)
        if first != name:
            tied[name] = first
            continue
        inner, entry = flatten(name, tensor.detach())
        if clash := (inner.keys() & plain.keys()) or ({name} & {NAMES, TIED}):
            raise ValueError(f"tensors: the name {min(clash)!r} would be used twice")
        plain.update({key: data.contiguous() for key, data in inner.items()})
        table[name] = json.dumps(entry)
    table[NAMES] = json.dumps(list(table))
    if tied:
        table[TIED] = json.dumps(tied)
    table["format"] = "pt"
    if clash := table.keys() & (metadata or {}).keys():
        raise ValueError(f"metadata: the key {min(clash)!r} is used by the file itself")
    write_safetensors(plain, filename, {**(metadata or {}), **table})


def write_safetensors(
    tensors: Mapping[str, Tensor], filename: str | os.PathLike[str], strings: Mapping[str, str]
) -> None:
    """Write plain tensors and a table of strings, under a temporary name that is then renamed.

    Two files of the same contents are equal. One tensor at a time is copied to the CPU.

    Raises:
        ValueError: the format has no such dtype; names the tensor.
    """
    with unfinished(Path(filename)) as temporary, temporary.open("wb") as file:
        file.writelines(safetensors_bytes(tensors, strings))


def safetensors_bytes(
    tensors: Mapping[str, Tensor], strings: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, piece by piece.

    Raises:
        ValueError: the format has no such dtype; names the tensor.
    """
    parts: dict[str, tuple[str, Sequence[int], int]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES_OF_DTYPES:
            allowed = ", ".join(map(str, _NAMES_OF_DTYPES))
            raise ValueError(f"tensors: {name!r} is {tensor.dtype}: allowed: {allowed}")
        parts[name] = _NAMES_OF_DTYPES[tensor.dtype], tensor.shape, tensor.nbytes
    yield file_header(parts, strings)
    for name in stored_order(parts):
        yield raw_bytes(tensors[name])


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a plain tensor, in the order of its elements."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return as_array(flat.view(torch.uint8)).data


def _check_contents(tensors: Any, metadata: Any) -> None:
    if isinstance(tensors, nn.Module):
        raise ValueError(
            f"tensors is a module, {type(tensors).__name__}: allowed: names to tensors, as "
            "model.state_dict() gives them"
        )
    if not isinstance(tensors, Mapping):
        raise ValueError(f"tensors={reprlib.repr(tensors)}: allowed: a dictionary of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"tensors has {reprlib.repr(name)}: {reprlib.repr(tensor)}: allowed: names as "
                "strings, with tensors"
            )
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            kind = "on the meta device" if tensor.device.type == "meta" else tensor.layout
            raise ValueError(f"tensors: {name!r} is {kind}: allowed: dense tensors with data")
    if metadata is None:
        return
    if not isinstance(metadata, Mapping):
        raise ValueError(f"metadata={reprlib.repr(metadata)}: allowed: a dictionary, or None")
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise ValueError(
                f"metadata has {reprlib.repr(key)}: {reprlib.repr(text)}: allowed: strings"
            )


def load_file(
    filename: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    allowed_codecs: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """Load a safetensors file that `save_file` or transformers wrote.

    Args:
        filename: a safetensors file; tensors that are not encoded are returned as they are.
        device: of the loaded tensors.
        allowed_codecs: names of codecs that may decode its weights, a second limit beside the
            process's (`torchcodec_weights.allowed_codecs`); None for no second limit.

    Returns:
        Names to tensors; load them with `model.load_state_dict(..., assign=True)`.

    Raises:
        CodecError: the file is not a safetensors file, or is cut short; or a bitstream is corrupt
            or from a newer version of the format, needs a codec that is not available or not
            allowed, or does not match the file's metadata; names the weight. Raised before
            anything is decoded.
        ValueError: `filename` is a directory, `device` is not a device, or `allowed_codecs` names
            an unknown codec.
    """
    path = Path(filename)
    if path.is_dir():
        raise ValueError(f"filename={str(filename)!r} is a directory: allowed: a safetensors file")
    plain, table = read_safetensors(path, device)
    return _all(plain, table, filename, allowed_codecs)


def load_folder(
    folder: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    allowed_codecs: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """Load all tensors of a Hugging Face directory with one or more safetensors files.

    The files are those that `model.safetensors.index.json` names, or all if there is no index.
    Tied weights that were not stored are not in the result.

    Args:
        folder: directory with the files.
        device: of the loaded tensors.
        allowed_codecs: as in `load_file`.

    Raises:
        CodecError: as in `load_file`; or the index is malformed or names a file outside.
        ValueError: a link in the directory leads out of it (`folder.check_folder`).
        FileNotFoundError: there is no safetensors file, or one that the index names is missing.
    """
    plain: dict[str, Tensor] = {}
    table: dict[str, str] = {}
    for path in folder_files(Path(folder)):
        # The inner tensors of one CodecTensor may be in different files.
        tensors, strings = read_safetensors(path, device)
        plain.update(tensors)
        table.update(strings)
    return _all(plain, table, folder, allowed_codecs)


def load_metadata(filename: str | os.PathLike[str]) -> dict[str, str]:
    """The strings in a safetensors file's metadata, without those of this layout.

    Raises:
        CodecError: the file is no safetensors file, or the table of names is malformed.
    """
    with _opened(filename) as file:
        return other_strings(file.metadata() or {}, filename)


def iterate_weights(
    plain: dict[str, Tensor],
    table: Mapping[str, str],
    source: str | os.PathLike[str],
    allowed_codecs: Iterable[str] | None = None,
) -> Iterator[tuple[str, Tensor | CodecError]]:
    """Build CodecTensors from the inner tensors in a file, one after the other.

    Args:
        plain: tensors as a safetensors file holds them; those that were used are removed.
        table: strings of the file.
        source: the file or directory, for messages.
        allowed_codecs: as in `load_file`.

    Returns:
        Names and tensors; for a tensor that is refused, its error.

    Raises:
        CodecError: the table of names is malformed.
    """

    def build(attributes: dict[str, Any]) -> Tensor:
        tensor = CodecTensor(**attributes)
        tensor.check(allowed_codecs)
        return tensor

    yield from Reader(_DTYPES, build, _first_bytes).weights(plain, table, source)


def read_safetensors(
    path: Path, device: str | torch.device
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The plain tensors of a safetensors file and its table of strings.

    Raises:
        CodecError: the file is no safetensors file, or one that is cut short.
        ValueError: `device` names no device.
    """
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        allowed = "a torch.device, or the name of one"
        raise ValueError(f"device={device!r}: allowed: {allowed}: {error}") from None
    _read_beginnings(path)
    with _opened(path, device) as file:
        plain = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        return plain, file.metadata() or {}


def _read_beginnings(path: Path) -> None:
    """Have the system read what opening weights needs: scales, and the headers of containers.

    On the first use of a mapped page it would read as much as is its read-ahead, megabytes on some
    disks, for each weight.
    """
    with suppress(CodecError, OSError):  # which opening the file tells
        read_ahead(path, read_header(path).beginnings())


@contextmanager
def _opened(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Iterator[Any]:
    """A safetensors file; what safetensors refuses of it is CodecError."""
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except safetensors.SafetensorError as error:
        raise CodecError(f"{path} cannot be read as safetensors: {error}") from None


def _all(
    plain: dict[str, Tensor],
    table: Mapping[str, str],
    source: str | os.PathLike[str],
    allowed_codecs: Iterable[str] | None,
) -> dict[str, Tensor]:
    """All tensors of a file; raises the error of the first that is refused."""
    allowed = None if allowed_codecs is None else check_names(allowed_codecs)
    tensors: dict[str, Tensor] = {}
    for name, tensor in iterate_weights(plain, table, source, allowed):
        if isinstance(tensor, CodecError):
            raise tensor
        tensors[name] = tensor
    return {**plain, **tensors}


def _first_bytes(tensor: Tensor) -> bytes | None:
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        return None
    return bytes(tensor[: len(MAGIC)].tolist())


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """A key that is equal for tensors that share memory, shape and dtype."""
    if isinstance(tensor, CodecTensor):
        return (
            tensor.qdata.data_ptr(),
            tuple(tensor.resolved_window),
            bool(tensor.transposed),
            tensor.dtype,
        )
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def flatten(name: str, tensor: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(tensor, CodecTensor):
        return {name: tensor}, {"_type": "Tensor"}
    names = [*CodecTensor.optional_tensor_data_names, *CodecTensor.tensor_data_names]
    names = [inner for inner in names if getattr(tensor, inner) is not None]
    return {key_of(name, inner): getattr(tensor, inner) for inner in names}, describe(name, tensor)


def describe(name: str, tensor: CodecTensor) -> dict[str, Any]:
    """A weight's entry in the table of strings: its attributes, and the digest of its name.

    torchao and transformers build a `CodecTensor` from it, which checks the digest (`binding`). So
    a weight that was stored under another name is refused.
    """
    entry: dict[str, Any] = json.loads(json.dumps(tensor, cls=third_party.attributes_encoder()))
    digest = binding_digest(name, header_bytes(as_array(tensor.qdata).data))
    entry["_data"]["binding"] = [name, digest]
    return entry


third_party.register_subclass(CodecTensor)
third_party.register_config(CodecWeightOnlyConfig)
torch.serialization.add_safe_globals([CodecTensor])
