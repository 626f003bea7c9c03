"""`inspect`: lists the weights in a compressed file, and extracts single tiles as files."""

import argparse
from pathlib import Path

from torch import Tensor

from torchcodec_weights.cli.page import check_page
from torchcodec_weights.cli.tile_file import suffix, tile_file
from torchcodec_weights.cli.weights import iterate_path
from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.container import read_tile
from torchcodec_weights.matrix.opened import as_array
from torchcodec_weights.models.report import report_tensors
from torchcodec_weights.system.files import unfinished
from torchcodec_weights.system.terminal import printable
from torchcodec_weights.tensor import CodecTensor


def run(args: argparse.Namespace) -> None:
    """Run the command with the arguments of `cli.arguments`."""
    if args.original is not None and args.html is None:
        raise ValueError(f"--original={str(args.original)!r}: allowed: with --html")
    if args.html is not None:
        check_page(args.html)
    tensors = _read(args.path)
    if args.extract_tile:
        _extract(tensors, *args.extract_tile)
        return
    report = report_tensors(tensors.items())
    if args.html is not None:
        original = args.original and _read(args.original, "--original")
        report.to_html(args.html, original)
    print(report.to_json() if args.json else report)


def _read(path: Path, argument: str = "FILE_OR_DIR") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in iterate_path(path, argument):
        if isinstance(tensor, CodecError):
            raise tensor
        tensors[name] = tensor
    return tensors


def _extract(tensors: dict[str, Tensor], name: str, index: str, out: str) -> None:
    tensor = tensors.get(name)
    if not isinstance(tensor, CodecTensor):
        coded = [key for key, value in tensors.items() if isinstance(value, CodecTensor)]
        names = ", ".join(coded[:5]) + (", …" if len(coded) > 5 else "")
        raise ValueError(f"NAME={name!r}: allowed: encoded weights: {names or 'there are none'}")
    header = tensor.header
    if not (index.isdecimal() and int(index) < len(header.tiles)):
        raise ValueError(f"INDEX={index!r}: allowed: 0 to {len(header.tiles) - 1}")
    payload, _ = read_tile(as_array(tensor.qdata).data, header, int(index))
    path = Path(out)
    if not path.suffix:
        path = path.with_suffix(suffix(header.codec))
    if path.exists() or not path.parent.is_dir():
        raise ValueError(f"OUT={str(path)!r}: allowed: a new name in a directory that exists")
    if not payload:
        raise ValueError(f"INDEX={index!r}: this tile was left out of {name}, which is a slice")
    block = header.blocks[int(index)]
    with unfinished(path) as temporary:
        temporary.write_bytes(tile_file(header.codec, payload, (block.rows, block.cols)))
    line = (
        f"{path}: rows {block.first_row} to {block.end_row - 1}, columns {block.first_col} to "
        f"{block.end_col - 1} of {name}, {header.codec}"
    )
    print(printable(line))
