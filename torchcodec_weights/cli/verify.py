"""`verify`: checks a compressed model for damage, weight by weight."""

import argparse
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm

from torchcodec_weights.cli.weights import add_allowed_codecs, add_source, iterate_path
from torchcodec_weights.errors import CodecError
from torchcodec_weights.matrix.opened import open_matrix, verify_tiles
from torchcodec_weights.system.terminal import printable
from torchcodec_weights.tensor import CodecTensor


def add(commands: Any) -> None:
    """Add the command to the subparsers of argparse."""
    parser = commands.add_parser(
        "verify",
        help="check a compressed model for damage",
        description="Check every checksum of every encoded weight, and what the file says of it. "
        "Names what is damaged; the exit status is 1 if anything is.",
    )
    add_source(parser)
    parser.add_argument(
        "--decode", action="store_true", help="decode every weight too, which takes longer"
    )
    add_allowed_codecs(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    count = stored = 0
    damaged: list[str] = []
    seen: set[int] = set()
    for name, weight in tqdm(iterate_path(args.path), desc="verifying", unit=" tensors"):
        if isinstance(weight, CodecError):
            damaged.append(str(weight))
        elif isinstance(weight, CodecTensor) and id(weight) not in seen:
            seen.add(id(weight))
            count, stored = count + 1, stored + weight.stored_bytes
            damaged += [f"{args.path}: {name}: {error}" for error in _errors(weight, args.decode)]
    for line in damaged:
        print(printable(line))
    if damaged:
        raise CodecError(f"{args.path}: {len(damaged)} errors")
    if not count:
        raise ValueError(f"FILE_OR_DIR={str(args.path)!r} holds no encoded weight")
    print(printable(f"{args.path}: {count} encoded weights, {stored:,} bytes: no errors"))


def _errors(weight: CodecTensor, decode: bool) -> Iterator[str]:
    """Errors in the tiles of a weight whose other data have been checked."""
    damaged = False
    for error in verify_tiles(open_matrix(*weight.coded)):
        damaged = True
        yield error
    if decode and not damaged:
        try:
            weight.dequantize()
        except CodecError as error:
            yield str(error)
