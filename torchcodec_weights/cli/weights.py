"""Reads the weights of a directory, of a safetensors file, or of a state dict."""

import pickle
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from torchcodec_weights.errors import CodecError
from torchcodec_weights.models.checkpoint import iterate_weights, read_safetensors
from torchcodec_weights.models.folder import safetensors_files
from torchcodec_weights.tensor import CodecTensor, deferred_checks

# Errors of torch.load for files that torch.save did not write.
_LOAD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)


def iterate_path(
    path: Path, argument: str = "FILE_OR_DIR"
) -> Iterator[tuple[str, Tensor | CodecError]]:
    """Names and tensors; for a tensor that is refused, its error.

    Args:
        path: a directory or a file.
        argument: name of the argument or option for `path`, for error messages.

    Raises:
        CodecError: the metadata that names the weights is malformed.
        ValueError: neither this package nor torch.save wrote `path`.
    """
    if files := safetensors_files(path):
        yield from _safetensors(files, path)
    else:
        yield from _state_dict(path, argument)


def _safetensors(files: list[Path], path: Path) -> Iterator[tuple[str, Tensor | CodecError]]:
    plain: dict[str, Tensor] = {}
    table: dict[str, str] = {}
    for file in files:
        tensors, strings = read_safetensors(file, "cpu")
        plain.update(tensors)
        table.update(strings)
    yield from iterate_weights(plain, table, path)
    yield from plain.items()


def _state_dict(path: Path, argument: str) -> Iterator[tuple[str, Tensor | CodecError]]:
    loaded = None
    if path.is_file():
        try:
            with deferred_checks():
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        except CodecError:
            raise
        except _LOAD_ERRORS:
            pass
    if not isinstance(loaded, dict):
        raise ValueError(
            f"{argument}={str(path)!r}: allowed: a directory with safetensors, a .safetensors "
            "file, a state dict that torch.save wrote"
        )
    for name, value in loaded.items():
        try:
            if isinstance(value, CodecTensor):
                value.check()
        except CodecError as error:
            yield str(name), type(error)(f"{path}: {name}: {error}")
        else:
            if isinstance(value, Tensor):
                yield str(name), value
