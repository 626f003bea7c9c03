"""`decompress`: back to dense weights, which need this package no longer."""

import argparse
from pathlib import Path
from typing import Any

import safetensors.torch

from torchcodec_weights.checkpoint import load_file, load_metadata
from torchcodec_weights.cli.output import check_output
from torchcodec_weights.files import unfinished
from torchcodec_weights.huggingface import copy_other_files, decompress_model, load_model
from torchcodec_weights.report import compression_report
from torchcodec_weights.tensor import CodecTensor


def add(commands: Any) -> None:
    """Add the command to the subparsers of argparse."""
    parser = commands.add_parser(
        "decompress",
        help="decode the weights of a compressed model",
        description="Decode what compress has encoded, to dense weights of their former dtype.",
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="compressed directory or .safetensors file"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="directory or file to write")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    source: Path = args.model
    if not source.is_dir() and not (source.is_file() and source.suffix == ".safetensors"):
        raise ValueError(
            f"MODEL={str(source)!r}: allowed: a directory or a .safetensors file that compress "
            "wrote"
        )
    check_output(args.out, source, force=args.force)
    count = (_folder if source.is_dir() else _file)(source, args.out)
    print(f"{args.out}: {count} weights decoded")


def _folder(source: Path, out: Path) -> int:
    model = load_model(source)
    count = _check_compressed(source, len(compression_report(model).weights))
    with unfinished(out) as folder:
        decompress_model(model).save_pretrained(folder)
        copy_other_files(source, folder)
    return count


def _file(source: Path, out: Path) -> int:
    tensors = load_file(source)
    coded = [name for name, tensor in tensors.items() if isinstance(tensor, CodecTensor)]
    count = _check_compressed(source, len(coded))
    # Names that share a weight get one each: a plain file cannot say so.
    dense = {
        name: tensor.dequantize() if isinstance(tensor, CodecTensor) else tensor.clone()
        for name, tensor in tensors.items()
    }
    with unfinished(out) as path:
        safetensors.torch.save_file(dense, path, {**load_metadata(source), "format": "pt"})
    return count


def _check_compressed(source: Path, count: int) -> int:
    if not count:
        raise ValueError(f"MODEL={str(source)!r} is dense: allowed: what compress wrote")
    return count
