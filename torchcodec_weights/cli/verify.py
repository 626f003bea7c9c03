"""`verify`: whether a compressed model is what was written, weight by weight."""

import argparse
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from torchcodec_weights.checkpoint import folder_files, iterate_weights, read_safetensors
from torchcodec_weights.codecs.base import CodecError
from torchcodec_weights.decoding import open_matrix, verify_tiles
from torchcodec_weights.policy import check_names
from torchcodec_weights.tensor import CodecTensor, deferred_checks
from torchcodec_weights.terminal import printable


def add(commands: Any) -> None:
    """Add the command to the subparsers of argparse."""
    parser = commands.add_parser(
        "verify",
        help="check a compressed model for damage",
        description="Check every checksum of every encoded weight, and what the file says of it. "
        "Names what is damaged; the exit status is 1 if anything is.",
    )
    parser.add_argument(
        "path",
        type=Path,
        metavar="FILE_OR_DIR",
        help="directory with safetensors, .safetensors file, or state dict saved by torch.save",
    )
    parser.add_argument(
        "--decode", action="store_true", help="decode every weight too, which takes longer"
    )
    parser.add_argument(
        "--allow-codecs",
        metavar="NAMES",
        help="codecs that weights may be encoded with, with commas between them; default: all",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    allowed = None if args.allow_codecs is None else check_names(args.allow_codecs.split(","))
    count = stored = 0
    damaged: list[str] = []
    seen: set[int] = set()
    for name, weight in tqdm(_weights(args.path, allowed), desc="verifying", unit=" weights"):
        if isinstance(weight, CodecTensor) and id(weight) not in seen:
            seen.add(id(weight))
            count, stored = count + 1, stored + weight.stored_bytes
            damaged += [f"{args.path}: {name}: {error}" for error in _errors(weight, args.decode)]
        elif isinstance(weight, CodecError):
            count += 1
            damaged.append(str(weight))
    for line in damaged:
        print(printable(line))
    if damaged:
        raise CodecError(f"{args.path}: {len(damaged)} errors in {count} encoded weights")
    print(f"{printable(str(args.path))}: {count} encoded weights, {stored:,} bytes: no errors")


def _weights(
    path: Path, allowed: frozenset[str] | None
) -> Iterator[tuple[str, Tensor | CodecError]]:
    """Names and tensors of a file or directory; in the place of one that is refused, why."""
    if path.is_dir() or path.suffix == ".safetensors":
        plain: dict[str, Tensor] = {}
        table: dict[str, str] = {}
        for file in folder_files(path) if path.is_dir() else [path]:
            tensors, strings = read_safetensors(file, "cpu")
            plain.update(tensors)
            table.update(strings)
        yield from iterate_weights(plain, table, path, allowed)
        return
    with deferred_checks():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            raise CodecError(f"{path}: torch.load cannot read it: {error}") from None
    if not isinstance(state, dict):
        raise CodecError(f"{path} holds {type(state).__name__}: needed: a state dict")
    for name, tensor in state.items():
        if isinstance(tensor, CodecTensor):
            try:
                tensor.check(allowed)
            except CodecError as error:
                yield str(name), type(error)(f"{path}: {name}: {error}")
            else:
                yield str(name), tensor


def _errors(weight: CodecTensor, decode: bool) -> Iterator[str]:
    """What is wrong with a weight that was checked but for its tiles."""
    damaged = False
    for error in verify_tiles(open_matrix(*weight.coded)):
        damaged = True
        yield error
    if decode and not damaged:
        try:
            weight.dequantize()
        except CodecError as error:
            yield str(error)
