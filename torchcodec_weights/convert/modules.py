"""Values for the modules of a model on the meta device, read when they are needed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from torchcodec_weights.calibration.blocks import NotByBlocksError
from torchcodec_weights.convert.plan import PlannedFile
from torchcodec_weights.convert.source import Source
from torchcodec_weights.format.safetensors import StoredTensor
from torchcodec_weights.third_party import fill_buffers


class StoredModules:
    """Reads the tensors of some of a model's modules, and forgets them again."""

    def __init__(self, model: Any, source: Source, files: Mapping[str, PlannedFile]) -> None:
        """Find each tensor of a model in its files.

        Args:
            model: of transformers, on the meta device. Buffers that are in no file get their
                values here.
            source: of the tensors.
            files: all its files of weights.

        Raises:
            NotByBlocksError: a tensor is in no file under its name, or of another shape.
        """
        stored = {
            name: (file.name, tensor)
            for file in files.values()
            for name, tensor in file.header.tensors.items()
        }
        if lost := fill_buffers(model):
            raise NotByBlocksError(f"{lost[0]} has no value that its files or its code tell")
        self._source = source
        self._owners: dict[int, list[tuple[nn.Module, str, str]]] = {}
        self._places: dict[int, tuple[str, StoredTensor]] = {}
        self._tensors: dict[int, Tensor] = {}
        for path, module in model.named_modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None or not tensor.is_meta:
                    continue
                full = f"{path}.{name}".lstrip(".")
                self._owners.setdefault(id(tensor), []).append((module, name, full))
                self._tensors[id(tensor)] = tensor
                if full in stored:
                    self._places.setdefault(id(tensor), stored[full])
        for key, owners in self._owners.items():
            full, shape = owners[0][2], tuple(self._tensors[key].shape)
            if key not in self._places:
                raise NotByBlocksError(
                    f"{full} is not in its files under this name: transformers makes it when it "
                    "loads the model"
                )
            if self._places[key][1].shape != shape:
                raise NotByBlocksError(f"{full} is stored as {self._places[key][1].shape}")

    def size(self, prefix: str) -> int:
        """Bytes of the tensors of a module and those in it, in the model's dtype; "" for all."""
        return sum(self._tensors[key].nbytes for key in self._inside(prefix))

    def _inside(self, prefix: str) -> list[int]:
        return [
            key
            for key, owners in self._owners.items()
            if not prefix or any(full.startswith(f"{prefix}.") for _, _, full in owners)
        ]

    @contextmanager
    def loaded(self, prefix: str, *, outside: bool = False) -> Iterator[None]:
        """Give values to the tensors of a module and of those in it, as long as the block lasts.

        Args:
            prefix: name of the module.
            outside: give them to all other tensors instead.

        Raises:
            OSError: a tensor cannot be read.
        """
        keys = self._inside(prefix)
        if outside:
            keys = [key for key in self._owners if key not in keys]
        try:
            for key in keys:
                tensor = self._read(key)
                for module, name, _ in self._owners[key]:
                    _set(module, name, tensor)
            yield
        finally:
            for key in keys:
                for module, name, _ in self._owners[key]:
                    _set(module, name, self._tensors[key])

    def _read(self, key: int) -> Tensor:
        file, stored = self._places[key]
        known = self._tensors[key]
        tensor = self._source.tensor(file, self._owners[key][0][2], stored).to(known.dtype)
        is_parameter = isinstance(known, nn.Parameter)
        return nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    table = module._parameters if name in module._parameters else module._buffers
    table[name] = tensor  # type: ignore[assignment]
