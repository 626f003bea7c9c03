"""Safetensors files, and the registration of CodecTensor with torchao and torch.load.

A safetensors file holds plain tensors and a table of strings. A CodecTensor `layer.weight` becomes
the tensors `layer._weight_qdata`, `layer._weight_scale` and so on, and a JSON entry `layer.weight`
in the table: the layout of torchao's own subclasses, which transformers reads and writes.
"""

import json
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import safetensors
import torch
from torch import Tensor, nn

from torchcodec_weights import third_party
from torchcodec_weights.config import CodecWeightOnlyConfig
from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.container import MAGIC, binding_digest, header_bytes
from torchcodec_weights.format.dtypes import dtype_name
from torchcodec_weights.format.safetensors import file_header, read_header, stored_order
from torchcodec_weights.matrix.geometry import FLOAT_DTYPES
from torchcodec_weights.matrix.opened import as_array
from torchcodec_weights.models.folder import check_finished, check_folder
from torchcodec_weights.policy import check_names
from torchcodec_weights.system.files import read_ahead, unfinished
from torchcodec_weights.tensor import CodecTensor

_NAMES_OF_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}
FORMAT_DTYPES = {name: dtype for dtype, name in _NAMES_OF_DTYPES.items()}
"""Dtypes by their names in files."""

_NAMES = "tensor_names"
_TIED = "tied"
_DECODED = "decoded_sha256"
"""Key of JSON: names of weights to the SHA-256 of what they decode to, as of the
weights of one file: `compress` writes it."""
_CHECKSUMS = "checksums"
"""Key of JSON: names of tensors that are not encoded to the CRC-32C of their bytes. Of the tensors
of one file: `compress` writes it."""
_OWN = (_NAMES, _TIED, _DECODED, _CHECKSUMS, "format")
_DTYPES = {dtype_name(dtype): dtype for dtype in FLOAT_DTYPES}
_REQUIRED = set(CodecTensor.tensor_attribute_names)
_ATTRIBUTES = {*_REQUIRED, *CodecTensor.optional_tensor_attribute_names, "binding"}
_INNER = {*CodecTensor.tensor_data_names, *CodecTensor.optional_tensor_data_names}
_BEGINNING = 2**16  # bytes of a tensor: more than a container's header, but for 4,000 tiles or more
_INNER_SETS = set(CodecTensor.tensor_data_names), _INNER
T = TypeVar("T")


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
        if clash := (inner.keys() & plain.keys()) or ({name} & {_NAMES, _TIED}):
            raise ValueError(f"tensors: the name {min(clash)!r} would be used twice")
        plain.update({key: data.contiguous() for key, data in inner.items()})
        table[name] = json.dumps(entry)
    table[_NAMES] = json.dumps(list(table))
    if tied:
        table[_TIED] = json.dumps(tied)
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


def folder_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory, sorted.

    Raises:
        CodecError, ValueError, FileNotFoundError: as in `load_folder`.
    """
    check_folder(folder)
    check_finished(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        contents = _json(index.read_bytes(), str(index), dict)
        files = contents.get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise CodecError(f"{index}: weight_map: needed: names of weights to names of files")
        for name in files.values():
            if name in ("", ".", "..") or Path(name).name != name:
                raise CodecError(
                    f"{index}: weight_map has {name!r}: allowed: files beside the index"
                )
        paths = sorted({folder / name for name in files.values()})
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no safetensors file")
    return paths


def load_metadata(filename: str | os.PathLike[str]) -> dict[str, str]:
    """The strings in a safetensors file's metadata, without those of this layout.

    Raises:
        CodecError: the file is no safetensors file, or the table of names is malformed.
    """
    with _opened(filename) as file:
        table: dict[str, str] = file.metadata() or {}
    ours = {*_OWN, *_names(table, filename)}
    return {key: text for key, text in table.items() if key not in ours}


class OwnStrings(NamedTuple):
    """What this layout says in a file's table of strings.

    Attributes:
        encoded: names of its CodecTensors.
        tied: JSON, as `save_file` writes it; None if it is not there.
        others: entries that are not of this layout.
    """

    encoded: list[str]
    tied: str | None
    others: dict[str, str]


def own_strings(table: Mapping[str, str]) -> OwnStrings:
    """What this layout says in a file's table of strings.

    Raises:
        CodecError: the table of names, or the entry of a weight, is malformed.
    """
    names = _names(table, "the file")
    kinds = {name: _entry(name, table)["_type"] for name in names if name in table}
    encoded = [name for name, kind in kinds.items() if kind == CodecTensor.__name__]
    others = {key: text for key, text in table.items() if key not in {*_OWN, *names}}
    return OwnStrings(encoded, table.get(_TIED), others)


def stored_hashes(table: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Hashes in a file's table of strings: of what weights decode to, and of other tensors.

    Raises:
        CodecError: they are malformed.
    """
    decoded = _json(table.get(_DECODED, "{}"), _DECODED, dict)
    return decoded, _json(table.get(_CHECKSUMS, "{}"), _CHECKSUMS, dict)


def table_of_strings(
    source: Mapping[str, str],
    listed: Sequence[str],
    entries: Mapping[str, str],
    decoded: Mapping[str, str],
    checksums: Mapping[str, str],
    marks: Mapping[str, str],
) -> dict[str, str]:
    """The table of strings of a file that is written tensor by tensor.

    Args:
        source: the table of the dense file.
        listed: names of the weights of all files of the model that have an entry.
        entries: of the weights of this file, JSON.
        decoded: names of its encoded weights to the SHA-256 of what they decode to.
        checksums: names of its other tensors to the CRC-32C of their bytes.
        marks: further entries.

    Raises:
        ValueError: a weight has the name of an entry.
    """
    own = own_strings(source)
    tied: dict[str, str] = json.loads(own.tied or "{}")
    here = dict(entries)
    for name in set(tied.values()) - here.keys():
        here[name] = json.dumps({"_type": "Tensor"})
    names = sorted({*listed, *here})
    table = {**own.others, **marks}
    if clash := ({*table, *_OWN} & {*names}) or (table.keys() & {*_OWN}):
        raise ValueError(f"the name {min(clash)!r} would be used twice: allowed: other names")
    table |= here
    table |= {_NAMES: json.dumps(names), "format": "pt"}
    for key, value in ((_TIED, tied), (_DECODED, decoded), (_CHECKSUMS, checksums)):
        if value:
            table[key] = json.dumps(dict(sorted(value.items())))
    return table


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
    tensors: dict[str, Tensor] = {}
    for name in _names(table, source):
        if name not in table and not any(_key(name, inner) in plain for inner in _INNER):
            continue  # in another file of the model, where its entry is too
        try:
            entry = _entry(name, table)
            keys = _keys(name, entry)
            if any(key in plain for key in keys.values()):
                tensors[name] = _unflatten(name, entry, keys, plain, allowed_codecs)
                yield name, tensors[name]
            # transformers lists tied weights that it does not store
        except CodecError as error:
            for inner in _INNER:
                plain.pop(_key(name, inner), None)
            text = str(error).removeprefix(f"{name}: ")
            yield name, type(error)(f"{source}: {name}: {text}")
    for name, tensor in plain.items():
        if _is_container(name, tensor):
            message = "is a bitstream, and the metadata does not say of which weight"
            yield name, CodecError(f"{source}: {name} {message}")
    tied = _json(table.get(_TIED, "{}"), f"{source}: {_TIED}", dict)
    for name, first in tied.items():
        if isinstance(first, str) and first in tensors:
            yield name, tensors[first]
        else:
            yield name, CodecError(f"{source}: {name} is tied to {first!r}, which is not there")


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
        tensors = read_header(path).tensors.values()
        ranges = [(tensor.start, min(tensor.nbytes, _BEGINNING)) for tensor in tensors]
        read_ahead(path, ranges)


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


def _json(text: str | bytes, what: str, kind: type[T]) -> T:
    """Parse JSON whose value has a given type; CodecError for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CodecError(f"{what} is not JSON that can be read: {error}") from None
    if not isinstance(value, kind):
        raise CodecError(f"{what} is JSON of {type(value).__name__}: needed: {kind.__name__}")
    return value


def _names(table: Mapping[str, str], source: str | os.PathLike[str]) -> list[str]:
    """Names of the tensors that a file lists; none if it does not have this layout."""
    if _NAMES not in table:
        return []
    names = _json(table[_NAMES], f"{source}: {_NAMES}", list)
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise CodecError(f"{source}: {_NAMES}: needed: different names")
    return names


def _entry(name: str, table: Mapping[str, str]) -> dict[str, Any]:
    """A tensor's entry in the table of strings.

    Raises:
        CodecError: there is none, or it is malformed.
    """
    if name not in table:
        raise CodecError("the metadata says nothing of it")
    entry = _json(table[name], "its metadata", dict)
    if not isinstance(entry.get("_type"), str):
        raise CodecError("its metadata does not say what it is (_type)")
    if entry["_type"] != CodecTensor.__name__:
        return entry
    data, names = entry.get("_data"), entry.get("_tensor_data_names")
    if not isinstance(data, dict) or not _REQUIRED <= data.keys() <= _ATTRIBUTES:
        raise CodecError(f"its metadata has _data={data!r}: needed: {', '.join(sorted(_REQUIRED))}")
    if not isinstance(names, list) or set(map(str, names)) not in _INNER_SETS:
        raise CodecError(
            f"its metadata has _tensor_data_names={names!r}: needed: qdata, scale, act_pre_scale; "
            "allowed besides: zero_point"
        )
    return entry


def _is_container(name: str, tensor: Tensor) -> bool:
    """Whether a plain tensor of a file is a weight's bitstream, by its bytes or by its name."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        return False
    return bytes(tensor[: len(MAGIC)].tolist()) == MAGIC or (
        name.rpartition(".")[2].startswith("_") and name.endswith("_qdata")
    )


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


def _key(name: str, inner: str) -> str:
    """Name of a weight's inner tensor in a safetensors file."""
    module, _, parameter = name.rpartition(".")
    return f"{module}._{parameter}_{inner}" if module else f"_{parameter}_{inner}"


def flatten(name: str, tensor: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(tensor, CodecTensor):
        return {name: tensor}, {"_type": "Tensor"}
    names = [*CodecTensor.optional_tensor_data_names, *CodecTensor.tensor_data_names]
    names = [inner for inner in names if getattr(tensor, inner) is not None]
    return {_key(name, inner): getattr(tensor, inner) for inner in names}, describe(name, tensor)


def describe(name: str, tensor: CodecTensor) -> dict[str, Any]:
    """A weight's entry in the table of strings: its attributes, and the digest of its name.

    torchao and transformers build a `CodecTensor` from it, which checks the digest (`binding`). So
    a weight that was stored under another name is refused.
    """
    entry: dict[str, Any] = json.loads(json.dumps(tensor, cls=third_party.attributes_encoder()))
    digest = binding_digest(name, header_bytes(as_array(tensor.qdata).data))
    entry["_data"]["binding"] = [name, digest]
    return entry


def _keys(name: str, entry: dict[str, Any]) -> dict[str, str]:
    """Names of a tensor's inner tensors, to the names of the plain tensors in the file."""
    if entry["_type"] != CodecTensor.__name__:
        return {"": name}
    return {inner: _key(name, inner) for inner in entry["_tensor_data_names"]}


def _unflatten(
    name: str,
    entry: dict[str, Any],
    keys: dict[str, str],
    plain: dict[str, Tensor],
    allowed_codecs: Iterable[str] | None,
) -> Tensor:
    """Build a tensor from its inner tensors, which are removed from `plain`."""
    if entry["_type"] != CodecTensor.__name__:
        return plain.pop(name)
    attributes = dict(entry["_data"])
    dtype = attributes["logical_dtype"]
    if isinstance(dtype, dict):
        attributes["logical_dtype"] = _DTYPES.get(str(dtype.get("_data")), dtype)
    for inner, key in keys.items():
        if key not in plain:
            raise CodecError(f"lacks its part {key!r}")
        attributes[inner] = plain.pop(key)
    binding = attributes.get("binding")
    if isinstance(binding, list) and binding[:1] != [name]:
        raise CodecError(f"was stored under another name, {binding[:1]}")
    tensor = CodecTensor(**attributes)
    tensor.check(allowed_codecs)
    return tensor


third_party.register_subclass(CodecTensor)
third_party.register_config(CodecWeightOnlyConfig)
torch.serialization.add_safe_globals([CodecTensor])
