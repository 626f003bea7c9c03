"""Files: safetensors, and what Hugging Face and torch.load need to know of CodecTensor.

A safetensors file holds plain tensors and a table of strings. A CodecTensor `layer.weight` becomes
the tensors `layer._weight_qdata`, `layer._weight_scale` and so on, and a JSON entry `layer.weight`
in the table: the layout of torchao's own subclasses, which transformers reads and writes.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchao.core.config
from torch import Tensor
from torchao.prototype.safetensors import safetensors_utils

import torchcodec_weights.config
from torchcodec_weights.codecs.base import CodecError
from torchcodec_weights.files import unfinished
from torchcodec_weights.tensor import CodecTensor, check_loadable

_NAMES = "tensor_names"
_TIED = "tied"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in torchcodec_weights.tensor.FLOAT_DTYPES
}


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
        filename: where to.
        metadata: strings to store besides.

    Raises:
        ValueError: a name or a key of `metadata` is one that this layout uses itself.
    """
    plain: dict[str, Tensor] = {}
    table: dict[str, str] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        first = seen.setdefault(_identity(tensor), name)
        if first != name:
            tied[name] = first
            continue
        parts, entry = _flatten(name, tensor.detach())
        if clash := (parts.keys() & plain.keys()) or ({name} & {_NAMES, _TIED}):
            raise ValueError(f"tensors: the name {min(clash)!r} would be used twice")
        plain.update({key: part.contiguous() for key, part in parts.items()})
        table[name] = json.dumps(entry)
    table[_NAMES] = json.dumps(list(table))
    if tied:
        table[_TIED] = json.dumps(tied)
    table["format"] = "pt"
    if clash := table.keys() & (metadata or {}).keys():
        raise ValueError(f"metadata: the key {min(clash)!r} is used by the file itself")
    with unfinished(Path(filename)) as temporary:
        safetensors.torch.save_file(plain, temporary, {**(metadata or {}), **table})


def load_file(
    filename: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Load a safetensors file that `save_file` or transformers wrote.

    Args:
        filename: a safetensors file; one without CodecTensors gives its tensors as they are.
        device: where to load them to.

    Returns:
        Names to tensors; load them with `model.load_state_dict(..., assign=True)`.

    Raises:
        CodecError: a bitstream is corrupt or from a newer version of the format, or needs a codec
            that is not here; says which package brings it. Nothing is decoded before.
    """
    plain, table = _read(Path(filename), device)
    return _assemble(plain, table, filename)


def load_folder(
    folder: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Load all tensors of a Hugging Face directory, of several safetensors files perhaps.

    The files are those that `model.safetensors.index.json` names, or all where there is no such
    file. Of tied weights, those that were not stored are not there.

    Args:
        folder: where the files are.
        device: where to load them to.

    Raises:
        CodecError: as in `load_file`.
        FileNotFoundError: there is no safetensors file, or one that the index names is missing.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        paths = [
            folder / name for name in set(json.loads(index.read_text())["weight_map"].values())
        ]
    else:
        paths = list(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no safetensors file")
    plain: dict[str, Tensor] = {}
    table: dict[str, str] = {}
    for path in sorted(paths):
        # The parts of one CodecTensor may lie in different files.
        tensors, strings = _read(path, device)
        plain.update(tensors)
        table.update(strings)
    return _assemble(plain, table, folder)


def load_metadata(filename: str | os.PathLike[str]) -> dict[str, str]:
    """The strings that a safetensors file holds besides, without those of this layout."""
    with safetensors.safe_open(filename, framework="pt") as file:
        table: dict[str, str] = file.metadata() or {}
    ours = {_NAMES, _TIED, "format"}
    if safetensors_utils.is_metadata_torchao(table):
        ours |= set(json.loads(table[_NAMES]))
    return {key: text for key, text in table.items() if key not in ours}


def _read(path: Path, device: str | torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The plain tensors of a file and its table of strings."""
    with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
        plain = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        return plain, file.metadata() or {}


def _assemble(
    plain: dict[str, Tensor], table: dict[str, str], source: str | os.PathLike[str]
) -> dict[str, Tensor]:
    if not safetensors_utils.is_metadata_torchao(table):
        return plain
    tensors: dict[str, Tensor] = {}
    for name in json.loads(table[_NAMES]):
        entry = json.loads(table[name])
        if not any(part in plain for part in _parts(name, entry)):
            continue  # transformers lists tied weights that it does not store
        try:
            tensors[name] = _unflatten(name, entry, plain)
        except KeyError as error:
            raise CodecError(f"{source}: {name} lacks its part {error}") from None
        except CodecError as error:
            raise type(error)(f"{source}: {name}: {error}") from None
    for name, first in json.loads(table.get(_TIED, "{}")).items():
        tensors[name] = tensors[first]
    return {**plain, **tensors}


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are one in memory."""
    if isinstance(tensor, CodecTensor):
        return (tensor.qdata.data_ptr(), tuple(tensor.part), bool(tensor.transposed), tensor.dtype)
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def _key(name: str, part: str) -> str:
    module, _, parameter = name.rpartition(".")
    return f"{module}._{parameter}_{part}" if module else f"_{parameter}_{part}"


def _flatten(name: str, tensor: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(tensor, CodecTensor):
        return {name: tensor}, {"_type": "Tensor"}
    parts = [*CodecTensor.optional_tensor_data_names, *CodecTensor.tensor_data_names]
    parts = [part for part in parts if getattr(tensor, part) is not None]
    entry = json.loads(json.dumps(tensor, cls=safetensors_utils.TensorSubclassAttributeJSONEncoder))
    return {_key(name, part): getattr(tensor, part) for part in parts}, entry


def _parts(name: str, entry: dict[str, Any]) -> list[str]:
    """Names of the plain tensors that make up a tensor."""
    if entry["_type"] != CodecTensor.__name__:
        return [name]
    return [_key(name, part) for part in entry["_tensor_data_names"]]


def _unflatten(name: str, entry: dict[str, Any], plain: dict[str, Tensor]) -> Tensor:
    """Take a tensor's parts out of `plain`."""
    if entry["_type"] != CodecTensor.__name__:
        return plain.pop(name)
    attributes = dict(entry["_data"])
    attributes["logical_dtype"] = _DTYPES[attributes["logical_dtype"]["_data"]]
    for part in entry["_tensor_data_names"]:
        attributes[part] = plain.pop(_key(name, part))
    tensor = CodecTensor(**attributes)
    check_loadable(tensor)
    return tensor


# Through these lists of torchao, transformers reads and writes CodecTensors and configurations.
safetensors_utils.ALLOWED_CLASSES[CodecTensor.__name__] = CodecTensor
safetensors_utils.ALLOWED_TENSORS_SUBCLASSES.append(CodecTensor.__name__)
torchao.core.config.ALLOWED_AO_MODULES.add(torchcodec_weights.config.__name__)
torch.serialization.add_safe_globals([CodecTensor])
