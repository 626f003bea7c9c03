"""`inspect` where it takes tensors: files of `torch.save`, pages, single tiles as files."""

from pathlib import Path

from torch import Tensor

from torchcodec_weights.cli.tile_file import suffix, tile_file
from torchcodec_weights.cli.weights import iterate_path
from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.container import read_tile
from torchcodec_weights.matrix.opened import as_array
from torchcodec_weights.models.report import Report, report_tensors
from torchcodec_weights.system.files import unfinished
from torchcodec_weights.system.terminal import printable
from torchcodec_weights.tensor import CodecTensor


def report(path: Path, html: Path | None, original: Path | None) -> Report:
    """The report on the weights of a directory or a file.

    Args:
        path: of the directory or file.
        html: a page to write; None for none.
        original: with `html`: what was compressed; None if it is not to be shown.

    Raises:
        CodecError: a weight is refused; names it.
        ValueError: `path` or `original` holds no weights, or not the same.
    """
    found = report_tensors(_read(path).items())
    if html is not None:
        before = None if original is None else _read(original, "--original")
        found.to_html(html, before)
    return found


def extract(path: Path, name: str, index: str, out: str) -> None:
    """Write the bitstream of a tile as a file, and say so.

    Args:
        path: of the directory or file with the weight.
        name: of the weight.
        index: of the tile, as users give it.
        out: the file to write, whose suffix may be left out.

    Raises:
        CodecError: a weight is refused; names it.
        ValueError: there is no such weight or tile, or the file cannot be written.
    """
    tensors = _read(path)
    tensor = tensors.get(name)
    if not isinstance(tensor, CodecTensor):
        coded = [key for key, value in tensors.items() if isinstance(value, CodecTensor)]
        names = ", ".join(coded[:5]) + (", …" if len(coded) > 5 else "")
        raise ValueError(f"NAME={name!r}: allowed: encoded weights: {names or 'there are none'}")
    header = tensor.header
    if not (index.isdecimal() and int(index) < len(header.tiles)):
        raise ValueError(f"INDEX={index!r}: allowed: 0 to {len(header.tiles) - 1}")
    payload, _ = read_tile(as_array(tensor.qdata).data, header, int(index))
    file = Path(out)
    if not file.suffix:
        file = file.with_suffix(suffix(header.codec))
    if file.exists() or not file.parent.is_dir():
        raise ValueError(f"OUT={str(file)!r}: allowed: a new name in a directory that exists")
    if not payload:
        raise ValueError(f"INDEX={index!r}: this tile was left out of {name}, which is a slice")
    block = header.blocks[int(index)]
    with unfinished(file) as temporary:
        temporary.write_bytes(tile_file(header.codec, payload, (block.rows, block.cols)))
    line = (
        f"{file}: rows {block.first_row} to {block.end_row - 1}, columns {block.first_col} to "
        f"{block.end_col - 1} of {name}, {header.codec}"
    )
    print(printable(line))


def _read(path: Path, argument: str = "FILE_OR_DIR") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in iterate_path(path, argument):
        if isinstance(tensor, CodecError):
            raise tensor
        tensors[name] = tensor
    return tensors
