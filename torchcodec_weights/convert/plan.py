"""Which tensors of a source are encoded, in what dtype, and which file each goes to.

Each file of the source becomes one file of the output, of the same name.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchao.quantization import FqnToConfig

from torchcodec_weights.config import CodecWeightOnlyConfig
from torchcodec_weights.convert.source import Source
from torchcodec_weights.format.dtypes import dtype_name
from torchcodec_weights.format.layout import own_strings
from torchcodec_weights.format.safetensors import SafetensorsHeader, StoredTensor, parse_header
from torchcodec_weights.models.checkpoint import FORMAT_DTYPES
from torchcodec_weights.models.huggingface import embedding_names, skeleton, weight_names
from torchcodec_weights.models.quantize import select_weights

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Dtypes of weights that can be encoded, by their names in files."""


@dataclass(frozen=True)
class Choice:
    """Which weights to encode, and with what.

    Attributes:
        config: of every weight but embeddings.
        include, exclude: regular expressions, as in `weight_names`.
        embeddings: of input and output embeddings; None to leave them dense, or to the patterns.
        calibrate: "self" or the path of a text, to give bits to what the model suffers from; None
            for the same target for all.
        data_free: whether the same target is for all after all, as the model cannot be tried.
    """

    config: CodecWeightOnlyConfig
    include: str | None = None
    exclude: str | None = None
    embeddings: CodecWeightOnlyConfig | None = None
    calibrate: str | None = None
    data_free: bool = False

    def configs(self, model: Any) -> dict[str, CodecWeightOnlyConfig]:
        """Names of the parameters of a transformers model that are encoded, and with what."""
        embeddings = self.embeddings
        names = weight_names(model, self.include, self.exclude, embeddings=embeddings is not None)
        configs = dict.fromkeys(names, self.config)
        if embeddings is not None:
            configs |= dict.fromkeys(embedding_names(model) & configs.keys(), embeddings)
        return configs

    def has_embeddings(self, model: Any) -> bool:
        """Whether embeddings of a model are encoded with a configuration of their own."""
        return self.embeddings is not None and bool(embedding_names(model) & {*self.configs(model)})

    def calibrated(self, model: Any) -> set[str]:
        """Those among them that `calibrate` is for: not embeddings that have their own rate."""
        return {name for name, found in self.configs(model).items() if found is self.config}


@dataclass(frozen=True)
class PlannedFile:
    """A file of weights of the source.

    Attributes:
        name: of the file, there and in the output.
        size: in bytes.
        version: what changes when it is written to (`Source.version`).
        raw: the bytes before its tensors.
        header: what they say.
    """

    name: str
    size: int
    version: str
    raw: bytes
    header: SafetensorsHeader

    @property
    def digest(self) -> str:
        """SHA-256 of its header."""
        return hashlib.sha256(self.raw).hexdigest()


@dataclass(frozen=True)
class Task:
    """A tensor to encode.

    Attributes:
        name: of the tensor in the source and in the output.
        file: that holds it.
        stored: where and as what.
        dtype: name of the dtype that it has in the model, and is encoded in.
        config: to encode it with.
    """

    name: str
    file: str
    stored: StoredTensor
    dtype: str
    config: CodecWeightOnlyConfig

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.stored.nbytes // FORMAT_DTYPES[self.stored.dtype].itemsize


@dataclass(frozen=True)
class Plan:
    """All that is to be done.

    Attributes:
        files: by name.
        tasks: the tensors to encode, by name, file by file in the order of their bytes.
        model: of a directory, on the meta device; None of a file.
    """

    files: dict[str, PlannedFile]
    tasks: dict[str, Task]
    model: Any | None

    def tasks_of(self, file: str) -> list[Task]:
        """The tensors of a file that are encoded."""
        return [task for task in self.tasks.values() if task.file == file]


class NamesDifferError(ValueError):
    """A model's weights have other names in its files, so that the model must be loaded."""


def read_file(source: Source, name: str) -> PlannedFile:
    """Read the header of a file of weights; raises as `Source.header` does."""
    version = source.version(name)
    header, raw = source.header(name)
    return PlannedFile(name, source.size(name), version, raw, header)


def kept_file(name: str, size: int, version: str, raw: bytes) -> PlannedFile:
    """A file of weights that is no longer there, from what was kept of it."""
    return PlannedFile(name, size, version, raw, parse_header(raw[8:], name))


def make_plan(source: Source, files: Iterable[PlannedFile], small: Path, choice: Choice) -> Plan:
    """Decide what is encoded, by the same rules as `quantize_` in memory.

    Args:
        source: where the tensors are.
        files: all its files of weights.
        small: directory with its small files.
        choice: of weights.

    Raises:
        ValueError: nothing is selected; or a tensor is there twice, is encoded already, or has a
            name that the output uses itself; or the model cannot be built.
        NamesDifferError: selected weights are in no file under their names.
    """
    by_name = {file.name: file for file in files}
    holders: dict[str, str] = {}
    for file in by_name.values():
        for name in file.header.tensors:
            if name in holders:
                raise ValueError(f"{source.text}: {name!r} is in {holders[name]} and {file.name}")
            holders[name] = file.name
        if encoded := own_strings(file.header.strings).encoded:
            raise ValueError(f"{source.text}: {encoded[0]} is encoded already: allowed: dense")
    if source.is_file:
        model, wanted = None, _chosen_by_shape(by_name.values(), choice)
    else:
        model, wanted = _chosen_by_model(by_name.values(), small, choice)
    if not wanted:
        raise ValueError(
            f"--include={choice.include!r}, --exclude={choice.exclude!r}: no weight is left to "
            "encode: allowed: patterns that leave a float weight of two dimensions or more"
        )
    tasks = {}
    for file in by_name.values():
        for name, stored in file.header.tensors.items():
            if name in wanted:
                dtype, config = wanted[name]
                tasks[name] = Task(name, file.name, stored, dtype, config)
    return Plan(by_name, tasks, model)


_Wanted = dict[str, tuple[str, CodecWeightOnlyConfig]]  # names to dtypes and configurations


def _chosen_by_shape(files: Iterable[PlannedFile], choice: Choice) -> _Wanted:
    """Of a file: all float tensors of two dimensions or more."""
    return {
        name: (FLOATS[stored.dtype], choice.config)
        for file in files
        for name, stored in file.header.tensors.items()
        if len(stored.shape) >= 2
        and stored.dtype in FLOATS
        and stored.nbytes
        and (choice.include is None or re.search(choice.include, name))
        and not (choice.exclude and re.search(choice.exclude, name))
    }


def _chosen_by_model(
    files: Iterable[PlannedFile], small: Path, choice: Choice
) -> tuple[Any, _Wanted]:
    """Of a directory: by the modules of its model."""
    stored = {name: tensor for file in files for name, tensor in file.header.tensors.items()}
    floats = [tensor.dtype for tensor in stored.values() if tensor.dtype in FLOATS]
    dtype = FORMAT_DTYPES[floats[0]] if floats else torch.float32
    model = skeleton(small, dtype)
    configs = choice.configs(model)
    if not configs:
        return model, {}
    jobs = select_weights(model, FqnToConfig(configs))
    wanted: _Wanted = {}
    for job in jobs:
        # Of tied weights a file holds one; where it holds more, it says that they may differ.
        here = [name for name in job.names if name in stored]
        if not here:
            raise NamesDifferError(
                f"{job.names[0]} has another name in the files of {small}: transformers converts "
                "them when it loads the model"
            )
        for name in here:
            shape = tuple(job.weight.shape)
            if stored[name].dtype not in FLOATS or stored[name].shape != shape:
                raise ValueError(
                    f"{small} cannot be opened: {name} is {stored[name].dtype} of shape "
                    f"{stored[name].shape}, and the model's is {shape}"
                )
            wanted[name] = dtype_name(job.weight.dtype), job.config
    return model, wanted


def shares(groups: Iterable[Sequence[Task]], count: int) -> list[list[Task]]:
    """Tensors shared out by size, the same at every call: the largest first, to who has least.

    Args:
        groups: of tensors that stay together.
        count: of shares.
    """

    def size(group: Sequence[Task]) -> int:
        return sum(task.weights for task in group)

    parts: list[list[Task]] = [[] for _ in range(count)]
    sizes = [0] * count
    for group in sorted(groups, key=lambda group: (-size(group), group[0].name)):
        least = sizes.index(min(sizes))
        parts[least].extend(group)
        sizes[least] += size(group)
    return parts
