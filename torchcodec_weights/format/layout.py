"""How weights lie in a safetensors file: which tensors they become, and what is said of them.

The file holds plain tensors and a table of strings. A CodecTensor `layer.weight` becomes the
tensors `layer._weight_qdata`, `layer._weight_scale` and so on, and a JSON entry `layer.weight` in
the table: the layout of torchao's own subclasses, which transformers reads and writes.

Without PyTorch, as headers are also listed without it (`models/headers.py`).
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.container import MAGIC

TYPE = "CodecTensor"
"""The class, as entries name it."""
DATA_NAMES = ("qdata", "scale", "act_pre_scale")
OPTIONAL_DATA_NAMES = ("zero_point",)
ATTRIBUTE_NAMES = ("logical_shape", "logical_dtype")
OPTIONAL_ATTRIBUTE_NAMES = ("window", "transposed")

NAMES = "tensor_names"
"""Key of JSON: names of the tensors that have an entry."""
TIED = "tied"
"""Key of JSON: names to the names of the weights that they share."""
_DECODED = "decoded_sha256"
"""Key of JSON: names of weights to the SHA-256 of what they decode to, as of the
weights of one file: `compress` writes it."""
_CHECKSUMS = "checksums"
"""Key of JSON: names of tensors that are not encoded to the CRC-32C of their bytes. Of the tensors
of one file: `compress` writes it."""
_OWN = (NAMES, TIED, _DECODED, _CHECKSUMS, "format")
_REQUIRED = set(ATTRIBUTE_NAMES)
_ATTRIBUTES = {*_REQUIRED, *OPTIONAL_ATTRIBUTE_NAMES, "binding"}
_INNER = {*DATA_NAMES, *OPTIONAL_DATA_NAMES}
_INNER_SETS = set(DATA_NAMES), _INNER

T = TypeVar("T")
Part = TypeVar("Part")
Weight = TypeVar("Weight")


def key_of(name: str, inner: str) -> str:
    """Name of a weight's inner tensor in a safetensors file."""
    module, _, parameter = name.rpartition(".")
    return f"{module}._{parameter}_{inner}" if module else f"_{parameter}_{inner}"


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
    encoded = [name for name, kind in kinds.items() if kind == TYPE]
    return OwnStrings(encoded, table.get(TIED), _without_own(table, names))


def other_strings(table: Mapping[str, str], source: str | os.PathLike[str]) -> dict[str, str]:
    """The entries of a file's table of strings that are not of this layout.

    Raises:
        CodecError: the table of names is malformed.
    """
    return _without_own(table, _names(table, source))


def _without_own(table: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    ours = {*_OWN, *names}
    return {key: text for key, text in table.items() if key not in ours}


def stored_hashes(table: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Hashes in a file's table of strings: of what weights decode to, and of other tensors.

    Raises:
        CodecError: they are malformed.
    """
    decoded = parse_json(table.get(_DECODED, "{}"), _DECODED, dict)
    return decoded, parse_json(table.get(_CHECKSUMS, "{}"), _CHECKSUMS, dict)


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
    table |= {NAMES: json.dumps(names), "format": "pt"}
    for key, value in ((TIED, tied), (_DECODED, decoded), (_CHECKSUMS, checksums)):
        if value:
            table[key] = json.dumps(dict(sorted(value.items())))
    return table


@dataclass(frozen=True)
class Reader(Generic[Part, Weight]):
    """What a file's tensors are made into: PyTorch's tensors, or what headers say of them.

    Attributes:
        dtypes: of weights, by name.
        build: makes a weight of its inner tensors and attributes, by name, and checks it; raises
            CodecError.
        first_bytes: as many first bytes of a plain tensor as `MAGIC` has; None if it is not uint8
            of one dimension.
    """

    dtypes: Mapping[str, Any]
    build: Callable[[dict[str, Any]], Weight]
    first_bytes: Callable[[Part], bytes | None]

    def weights(
        self, plain: dict[str, Part], table: Mapping[str, str], source: str | os.PathLike[str]
    ) -> Iterator[tuple[str, Part | Weight | CodecError]]:
        """Build weights from the plain tensors of a file, one after the other.

        Args:
            plain: tensors as a safetensors file holds them; those that were used are removed.
            table: strings of the file.
            source: the file or directory, for messages.

        Returns:
            Names and weights; for a weight that is refused, its error.

        Raises:
            CodecError: the table of names is malformed.
        """
        found: dict[str, Part | Weight] = {}
        for name in _names(table, source):
            if name not in table and not any(key_of(name, inner) in plain for inner in _INNER):
                continue  # in another file of the model, where its entry is too
            try:
                entry = _entry(name, table)
                keys = _keys(name, entry)
                if any(key in plain for key in keys.values()):
                    found[name] = self._unflatten(name, entry, keys, plain)
                    yield name, found[name]
                # transformers lists tied weights that it does not store
            except CodecError as error:
                for inner in _INNER:
                    plain.pop(key_of(name, inner), None)
                text = str(error).removeprefix(f"{name}: ")
                yield name, type(error)(f"{source}: {name}: {text}")
        for name, part in plain.items():
            if self._is_container(name, part):
                message = "is a bitstream, and the metadata does not say of which weight"
                yield name, CodecError(f"{source}: {name} {message}")
        tied = parse_json(table.get(TIED, "{}"), f"{source}: {TIED}", dict)
        for name, first in tied.items():
            if isinstance(first, str) and first in found:
                yield name, found[first]
            else:
                yield name, CodecError(f"{source}: {name} is tied to {first!r}, which is not there")

    def _unflatten(
        self, name: str, entry: dict[str, Any], keys: dict[str, str], plain: dict[str, Part]
    ) -> Part | Weight:
        """Build a weight from its inner tensors, which are removed from `plain`."""
        if entry["_type"] != TYPE:
            return plain.pop(name)
        attributes = dict(entry["_data"])
        dtype = attributes["logical_dtype"]
        if isinstance(dtype, dict):
            attributes["logical_dtype"] = self.dtypes.get(str(dtype.get("_data")), dtype)
        for inner, key in keys.items():
            if key not in plain:
                raise CodecError(f"lacks its part {key!r}")
            attributes[inner] = plain.pop(key)
        binding = attributes.get("binding")
        if isinstance(binding, list) and binding[:1] != [name]:
            raise CodecError(f"was stored under another name, {binding[:1]}")
        return self.build(attributes)

    def _is_container(self, name: str, part: Part) -> bool:
        """Whether a plain tensor is a weight's bitstream, by its bytes or by its name."""
        first = self.first_bytes(part)
        return first is not None and (
            first == MAGIC or (name.rpartition(".")[2].startswith("_") and name.endswith("_qdata"))
        )


def parse_json(text: str | bytes, what: str, kind: type[T]) -> T:
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
    if NAMES not in table:
        return []
    names = parse_json(table[NAMES], f"{source}: {NAMES}", list)
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise CodecError(f"{source}: {NAMES}: needed: different names")
    return names


def _entry(name: str, table: Mapping[str, str]) -> dict[str, Any]:
    """A tensor's entry in the table of strings.

    Raises:
        CodecError: there is none, or it is malformed.
    """
    if name not in table:
        raise CodecError("the metadata says nothing of it")
    entry = parse_json(table[name], "its metadata", dict)
    if not isinstance(entry.get("_type"), str):
        raise CodecError("its metadata does not say what it is (_type)")
    if entry["_type"] != TYPE:
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


def _keys(name: str, entry: dict[str, Any]) -> dict[str, str]:
    """Names of a tensor's inner tensors, to the names of the plain tensors in the file."""
    if entry["_type"] != TYPE:
        return {"": name}
    return {inner: key_of(name, inner) for inner in entry["_tensor_data_names"]}
