"""Directories of transformers models: load one, choose its weights, save it compressed or dense."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchcodec_weights import third_party
from torchcodec_weights.config import CodecWeightOnlyConfig
from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.safetensors import LENGTH_BYTES, header_length, sorted_header
from torchcodec_weights.matrix.dtypes import FLOAT_DTYPES
from torchcodec_weights.models.checkpoint import describe
from torchcodec_weights.models.folder import check_finished, check_folder
from torchcodec_weights.models.report import decompress_
from torchcodec_weights.tensor import CodecTensor

# Weights in any format, and the indices of their files.
_WEIGHT_FILES = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.gguf",
    "*.index.json",
)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a directory, after checks of the directory.

    Raises:
        ValueError: the directory is not one of a transformers model with safetensors; or
            `config.json` or the index of the files of weights is malformed or names a file outside
            the directory; there is an adapter; or `check_folder` refuses the directory.
    """
    check_finished(folder)
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no config.json, or no *.safetensors, of a model")
    return read_small_files(folder)


def read_small_files(folder: Path) -> dict[str, Any]:
    """As `read_config`, of a directory that need not hold the files of weights.

    Raises:
        ValueError: as in `read_config`.
    """
    check_folder(folder)
    # Where peft is installed, transformers would load the adapter too, into a model that cannot be
    # saved, and may take the model that the adapter names, from anywhere.
    if (adapter := folder / "adapter_config.json").exists():
        raise ValueError(
            f"{adapter} is of an adapter: allowed: directories of models without one; merge it "
            "into its model first (peft's merge_and_unload)"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json, or no *.safetensors, of a model")
    config = _read_object(path)
    if not isinstance(config.get("quantization_config", {}), dict):
        raise ValueError(f"{path}: quantization_config: allowed: a JSON object")
    names = config.get("architectures") or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{path}: architectures: allowed: a list of names of classes")
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).exists():
            _check_index(folder / index)
    return config


def _check_index(path: Path) -> None:
    """Refuse an index that makes transformers read files that `check_folder` does not check."""
    files = _read_object(path).get("weight_map")
    if not (isinstance(files, dict) and all(isinstance(name, str) for name in files.values())):
        raise ValueError(f"{path}: weight_map: allowed: an object of names of weights and files")
    for name in files.values():
        parts = name.split("/")
        if not all(parts) or any(part.startswith(".") for part in parts):
            raise ValueError(
                f"{path} names the file {name!r}: allowed: files of this directory that are not "
                "hidden"
            )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON that can be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}: allowed: a JSON object")
    return value


def load_model(folder: Path) -> Any:
    """Load the model of a directory, dense or compressed, in the dtype of its file.

    Raises:
        ValueError: the directory is not one of a transformers model with safetensors, or of one
            whose code is not in transformers, or that transformers cannot open.
        ModuleNotFoundError: transformers is missing.
        CodecError: a bitstream is corrupt, or its codec is not available.
    """
    config = read_config(folder)
    kind = _model_class(folder, config)
    with _as_value_error(folder):
        return kind.from_pretrained(folder, dtype="auto", local_files_only=True).eval()


def skeleton(folder: Path, dtype: torch.dtype) -> Any:
    """The model of a directory on the meta device: all its modules, and no weights.

    Args:
        folder: directory with `config.json`; the files of weights need not be there.
        dtype: of the weights, if `config.json` does not say it.

    Raises:
        ValueError, ModuleNotFoundError: as in `load_model`.
    """
    kind = _model_class(folder, read_small_files(folder))
    from transformers import AutoConfig

    with _as_value_error(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        build = getattr(kind, "from_config", kind)  # the automatic classes are no models
        with _default_dtype(config.dtype or dtype):  # buffers of float32 stay so
            return build(config).eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _model_class(folder: Path, config: dict[str, Any]) -> Any:
    """The class that was saved: AutoModel would leave out heads."""
    name = (config.get("architectures") or ["AutoModel"])[0]
    try:
        import transformers
    except ModuleNotFoundError:
        message = "transformers is not installed: pip install 'torchcodec-weights[models]'"
        raise ModuleNotFoundError(message, name="transformers") from None
    kind: Any = getattr(transformers, name, None)
    if not hasattr(kind, "from_pretrained"):
        raise ValueError(f"{folder} is of {name!r}: allowed: models whose code is in transformers")
    return kind


@contextmanager
def _as_value_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except (CodecError, ImportError, OSError, ValueError):
        raise
    except Exception as error:
        # With a stranger's config.json or weights that do not fit it, transformers and the packages
        # that it uses raise errors of any type, their own included.
        raise ValueError(
            f"{folder} cannot be opened by transformers: {type(error).__name__}: {error}"
        ) from error


def weight_names(
    model: Any, include: str | None = None, exclude: str | None = None, *, embeddings: bool = False
) -> list[str]:
    """Names of the parameters to encode: by default all Linear weights except the output embedding.

    Args:
        model: a transformers model.
        include: regular expression; if given, parameters of two dimensions or more whose names
            match it (`re.search`) are encoded instead of the Linear weights.
        exclude: regular expression; parameters whose names match it are not encoded.
        embeddings: whether to encode input and output embeddings too.
    """
    output = model.get_output_embeddings()
    of_embeddings = embedding_names(model) if embeddings else ()
    names = []
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            if parameter.dim() < 2 or parameter.dtype not in FLOAT_DTYPES:
                continue
            if include is None:
                chosen = isinstance(module, nn.Linear) and module is not output
            else:
                chosen = re.search(include, name) is not None
            chosen = chosen or name in of_embeddings
            if chosen and not (exclude and re.search(exclude, name)):
                names.append(name)
    return names


def embedding_names(model: Any) -> set[str]:
    """Names of the weights of a transformers model's input and output embeddings."""
    modules = [model.get_output_embeddings()]
    with suppress(NotImplementedError):  # a model of several, CLIP say, has no one input embedding
        modules.append(model.get_input_embeddings())
    return {
        f"{path}.weight"
        for path, module in model.named_modules()
        if any(module is one for one in modules)
    }


def save_compressed(
    model: Any, folder: Path, config: CodecWeightOnlyConfig, *, embeddings: bool
) -> None:
    """Save a model with CodecTensors so that `from_pretrained` opens it again.

    Args:
        model: a transformers model.
        folder: directory to write.
        config: of the encoded weights; stored in `config.json`.
        embeddings: whether embeddings were encoded too.
    """
    quantization = _set_quantization(model, config, embeddings=embeddings)
    model.hf_quantizer = third_party.torchao_quantizer(quantization)
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        _sort_strings(path)


def save_config(
    model: Any, folder: Path, config: CodecWeightOnlyConfig, *, embeddings: bool
) -> None:
    """Write the `config.json` of a model, on the meta device too, whose weights are encoded.

    Args:
        model: a transformers model.
        folder: directory to write to.
        config: of the encoded weights.
        embeddings: whether embeddings were encoded too.
    """
    _set_quantization(model, config, embeddings=embeddings)
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def _set_quantization(model: Any, config: CodecWeightOnlyConfig, *, embeddings: bool) -> Any:
    from transformers import TorchAoConfig

    quantization = TorchAoConfig(config, include_input_output_embeddings=embeddings)
    model.config.quantization_config = quantization
    return quantization


def _sort_strings(path: Path) -> None:
    """Sort a file's table of strings, whose order differs from run to run."""
    with path.open("r+b") as file:
        length = header_length(file.read(LENGTH_BYTES), str(path))
        text = sorted_header(file.read(length), str(path))
        file.seek(LENGTH_BYTES)
        file.write(text)


def _stored_state(model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Plain tensors and strings of a model's state dict; tied weights once."""
    tied = {
        name
        for name, source in third_party.tied_weights(model).items()
        if model.get_parameter(name) is model.get_parameter(source)
    }
    state = {name: weight for name, weight in model.state_dict().items() if name not in tied}
    for name, weight in state.items():
        if isinstance(weight, CodecTensor) and weight.device.type == "meta":
            state[name] = third_party.offloaded_parameter(model, name)
    tensors, strings = third_party.flatten_state_dict(state)
    for name, weight in state.items():
        if isinstance(weight, CodecTensor):
            strings[name] = json.dumps(describe(name, weight))
    return tensors, strings


third_party.adapt_quantizer(CodecTensor, _stored_state)


def decompress_model(model: Any) -> Any:
    """Make a transformers model dense in place, and remove its quantization configuration.

    Raises:
        CodecError: a bitstream is corrupt.
    """
    decompress_(model)
    third_party.forget_quantization(model)
    return model


def is_weights(name: str) -> bool:
    """Whether a file holds weights in any format, or is an index of such files."""
    return any(fnmatch(name, pattern) for pattern in _WEIGHT_FILES)


def copy_other_files(source: Path, target: Path) -> None:
    """Copy a model directory's tokenizer and other files, except weights and existing files.

    Hidden files and directories are not copied.

    Raises:
        ValueError: `check_folder` refuses the directory; nothing is copied.
    """
    check_folder(source)
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        copy = target / name
        if path.is_file() and not hidden and not is_weights(path.name) and not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
