"""`verify`: checks a compressed model for damage, weight by weight."""

import argparse
from collections.abc import Iterator

from torch import Tensor
from tqdm.auto import tqdm

from torchcodec_weights.cli.weights import iterate_path
from torchcodec_weights.errors import CodecError
from torchcodec_weights.matrix.opened import open_matrix, verify_tiles
from torchcodec_weights.models.digests import Hashes
from torchcodec_weights.models.folder import safetensors_files
from torchcodec_weights.system.terminal import printable
from torchcodec_weights.tensor import CodecTensor


def run(args: argparse.Namespace) -> None:
    """Run the command with the arguments of `cli.arguments`."""
    count = stored = others = 0
    damaged: list[str] = []
    seen: set[int] = set()
    hashes = Hashes(safetensors_files(args.path))
    for name, weight in tqdm(iterate_path(args.path), desc="verifying", unit=" tensors"):
        if isinstance(weight, CodecError):
            damaged.append(str(weight))
        elif id(weight) not in seen:
            seen.add(id(weight))
            if isinstance(weight, CodecTensor):
                count, stored = count + 1, stored + weight.stored_bytes
            elif name in hashes.checksums:
                others += weight.nbytes
            found = _errors(name, weight, hashes, args.decode)
            damaged += [f"{args.path}: {name}: {error}" for error in found]
    for line in damaged:
        print(printable(line))
    if damaged:
        raise CodecError(f"{args.path}: {len(damaged)} errors")
    if not count:
        raise ValueError(f"FILE_OR_DIR={str(args.path)!r} holds no encoded weight")
    beside = f", and {others:,} bytes of other tensors" if others else ""
    line = f"{args.path}: {count} encoded weights, {stored:,} bytes{beside}: no errors"
    print(printable(line))


def _errors(name: str, tensor: Tensor, hashes: Hashes, decode: bool) -> Iterator[str]:
    """Errors in the data of a tensor whose header has been checked."""
    damaged = False
    if isinstance(tensor, CodecTensor):
        for error in verify_tiles(open_matrix(*tensor.coded)):
            damaged = True
            yield error
    try:
        if not damaged and (wrong := hashes.error_of(name, tensor, decode=decode)):
            yield wrong
    except CodecError as error:
        yield str(error)
