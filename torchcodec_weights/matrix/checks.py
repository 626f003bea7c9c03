"""What is checked of a stored weight before a tile of it is read (docs/security.md).

Without PyTorch: these checks are the same for weights that are opened, and for those whose headers
alone are listed.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torchcodec_weights.codecs.base import BaseCodec, Codec
from torchcodec_weights.codecs.names import is_known
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.errors import CodecError
from torchcodec_weights.format import container
from torchcodec_weights.matrix.geometry import refused_window
from torchcodec_weights.policy import check_codec, check_expansion

ARRAYS = {"qdata": "uint8", "scale": "uint8", "zero_point": "float32", "act_pre_scale": "uint8"}
"""Names of the arrays of a weight to their dtypes. Each has one dimension."""


def refused_array(name: str, kind: str, shape: tuple[int, ...]) -> str:
    """Why an array is refused, in words for users.

    Args:
        name: of the array, one of `ARRAYS`.
        kind: its layout and dtype, as PyTorch writes them.
        shape: of the array.
    """
    return f"{name} is {kind} of shape {shape}: allowed: torch.{ARRAYS[name]} of one dimension"


def check_header(
    read: Callable[[int], bytes],
    total: int,
    scale: bytes,
    zero_point: bytes | None,
    act_pre_scale: bytes,
) -> tuple[container.Header, BaseCodec]:
    """Read and check everything of an encoded matrix except its tiles.

    Args:
        read: returns the first n bytes of the container, given n.
        total: bytes of the container.
        scale, zero_point, act_pre_scale: all bytes of these arrays.

    Raises:
        CodecError: corrupt, from a newer format, larger than allowed, or of a codec that is not
            available or not allowed.
    """
    header = container.read_header(read, total)
    vectors = [array for array in (scale, zero_point, act_pre_scale) if array is not None]
    if container.crc32c(*vectors) != header.vectors_crc:
        raise CodecError("scale, zero_point or act_pre_scale is corrupt or of another matrix")
    for name, count, allowed in (
        ("scale", len(scale), (1, header.rows)),
        ("zero_point", None if zero_point is None else len(zero_point) // 4, (header.rows,)),
        ("act_pre_scale", len(act_pre_scale), (1, header.cols)),
    ):
        if count is not None and count not in allowed:
            raise CodecError(
                f"{name} of {count} elements does not fit a matrix of "
                f"{header.rows}x{header.cols}: allowed: {' or '.join(map(str, allowed))}"
            )
    check_expansion(header, header.total_size + sum(map(len, vectors)))
    if not is_known(header.codec):
        raise CodecError(
            f"encoded with the codec {header.codec!r}, which this version of torchcodec_weights "
            "does not have: upgrade it, or install the package that brings this codec"
        )
    check_codec(header.codec)
    codec = get_codec(header.codec)
    codec.require(encoder=False)
    if header.across != 1 and not isinstance(codec, Codec):
        raise CodecError(f"tiles of codec {codec.name!r} are blocks: allowed: whole rows")
    if header.order & ~_orders_of(codec):
        raise CodecError(f"rows or columns of codec {codec.name!r} are sorted: allowed: unsorted")
    return header, codec


def _orders_of(codec: BaseCodec) -> int:
    """The flags of `Header.order` that matrices of a codec may have."""
    if not isinstance(codec, Codec):
        return 0
    if not codec.decodes_whole:
        return container.SORTED_COLUMNS | container.SORTED_ROWS
    return container.SORTED_COLUMNS if codec.feeds_back else 0


def check_binding(binding: Any) -> None:
    """Refuse a binding that is not a name and a digest, or None.

    Raises:
        CodecError: says so.
    """
    if binding is not None and not (
        isinstance(binding, list) and [type(part) for part in binding] == [str, str]
    ):
        raise CodecError(f"binding={binding!r}: allowed: a name and a digest, or None")


def check_attributes(
    header: container.Header,
    logical_shape: list[int],
    window: list[int] | None,
    transposed: bool | None,
    binding: list[str] | None,
    allowed_codecs: Iterable[str] | None = None,
) -> None:
    """Refuse attributes of a weight that its matrix does not have.

    Args:
        header: of the matrix.
        logical_shape, window, transposed: as in `CodecTensor`, not refused by `refused_geometry`.
        binding: not refused by `check_binding`.
        allowed_codecs: names of codecs that may decode it, beside the process's limit; None for no
            second limit.

    Raises:
        CodecError: names the first.
    """
    check_codec(header.codec, allowed_codecs)
    matrix = header.rows, header.cols
    if reason := refused_window(logical_shape, window, transposed, matrix):
        raise CodecError(reason)
    if binding is not None:
        name, stored = binding
        if container.binding_digest(name, header.raw) != stored:
            raise CodecError("holds a bitstream that was not stored under this name")


def named(error: CodecError, binding: list[str]) -> CodecError:
    """The error with the name of the weight before its message."""
    return type(error)(f"{binding[0]}: {error}")
