"""`decompress`: decodes to dense weights, which do not need this package."""

import argparse
from pathlib import Path

from torch import Tensor

from torchcodec_weights.convert.output import FILE_MARK, check_output, check_replaceable, new_folder
from torchcodec_weights.errors import CodecError
from torchcodec_weights.models.checkpoint import load_file, load_metadata, write_safetensors
from torchcodec_weights.models.huggingface import copy_other_files, decompress_model, load_model
from torchcodec_weights.models.report import compression_report
from torchcodec_weights.system.terminal import printable
from torchcodec_weights.tensor import CodecTensor


def run(args: argparse.Namespace) -> None:
    """Run the command with the arguments of `cli.arguments`."""
    source: Path = args.model
    if not source.is_dir() and not (source.is_file() and source.suffix == ".safetensors"):
        raise ValueError(
            f"MODEL={str(source)!r}: allowed: a directory or a .safetensors file that compress "
            "wrote"
        )
    check_output(args.out, source, is_file=source.is_file(), force=args.force)
    count = (_folder if source.is_dir() else _file)(source, args.out, force=args.force)
    print(printable(f"{args.out}: {count} weights decoded"))


def _folder(source: Path, out: Path, *, force: bool) -> int:
    model = load_model(source)
    count = _check_compressed(source, len(compression_report(model).weights))
    decompress_model(model)
    with new_folder(out, force=force) as folder:
        model.save_pretrained(folder)
        copy_other_files(source, folder)
    return count


def _file(source: Path, out: Path, *, force: bool) -> int:
    tensors = load_file(source)
    coded = [name for name, tensor in tensors.items() if isinstance(tensor, CodecTensor)]
    count = _check_compressed(source, len(coded))
    # Names that share a weight get a copy each, as a plain file cannot store that they share it.
    dense = {name: _dense(name, tensor) for name, tensor in tensors.items()}
    check_replaceable(out, force=force)
    write_safetensors(dense, out, load_metadata(source) | FILE_MARK | {"format": "pt"})
    return count


def _dense(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, CodecTensor):
        return tensor
    try:
        return tensor.dequantize()
    except CodecError as error:
        raise type(error)(f"{name}: {error}") from None


def _check_compressed(source: Path, count: int) -> int:
    if not count:
        raise ValueError(f"MODEL={str(source)!r} is dense: allowed: what compress wrote")
    return count
