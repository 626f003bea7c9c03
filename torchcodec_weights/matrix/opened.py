"""An encoded matrix with its header read and checked, once as long as its tensors do not change."""

import ctypes
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchcodec_weights.codecs.base import BaseCodec, Codec, Product
from torchcodec_weights.codecs.common.cuda import refuse_first_use
from torchcodec_weights.codecs.records import StoredMatrix
from torchcodec_weights.errors import CodecError
from torchcodec_weights.format import container
from torchcodec_weights.format.order import sorted_order, sorted_rows
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.checks import ARRAYS, check_header, refused_array
from torchcodec_weights.matrix.normalize import decode_scale
from torchcodec_weights.third_party import version_of

_MOST_PRODUCTS = 8
"""Windows of a matrix whose products are kept."""

Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor]


@dataclass(eq=False)
class OpenedMatrix:
    """An encoded matrix with its header read and checked, ready to decode.

    Attributes:
        header: of the container.
        codec: of the matrix.
        tensors: qdata, scale, zero_point and act_pre_scale.
        host: the same tensors on the CPU; None if they are not needed there at each use.
        serial: a number that identifies the object during the life of the process.
    """

    header: container.Header
    codec: BaseCodec
    tensors: Tensors
    host: Tensors | None
    serial: int = field(default_factory=count().__next__)
    _products: dict[Window, Product] = field(default_factory=dict)

    def stored(self) -> StoredMatrix:
        """The matrix as codecs take it. Built for each use, as decoded scales take memory."""
        header = self.header
        qdata, scale, zero_point, act_pre_scale = self.host or self.tensors
        # Copies: the table in the header's bytes may be unaligned, and compiled code reads words.
        tiles = {name: header.tiles[name].copy() for name in header.tiles.dtype.names or ()}
        return StoredMatrix(
            data=as_array(qdata).data,
            offsets=header.offsets,
            payload_sizes=tiles["payload_size"],
            outlier_sizes=tiles["outliers_size"],
            crcs=tiles["crc"],
            units=tiles["unit"],
            rows=header.rows,
            cols=header.cols,
            row_scale=decode_scale(as_array(scale), header.row_base),
            col_scale=decode_scale(as_array(act_pre_scale), header.col_base),
            zero_point=None if zero_point is None else as_array(zero_point),
            dtype=header.dtype,
            private=header.private,
            column_order=self.column_order,
        )

    @cached_property
    def column_order(self) -> NDArray[np.uint32] | None:
        """uint32 (cols,): which column codecs got at each place; None if as in the matrix."""
        if not self.header.order & container.SORTED_COLUMNS:
            return None
        return sorted_order(as_array((self.host or self.tensors)[3]), self.header.cols)

    def row_order(self, first: int, end: int) -> NDArray[np.uint32] | None:
        """uint32 (end − first,): which row of a tile, counted from `first`, codecs got at each
        place; None if as in the matrix."""
        if not self.header.order & container.SORTED_ROWS:
            return None
        return sorted_rows(as_array((self.host or self.tensors)[1]), first, end)

    def product(self, window: Window) -> Product:
        """The codec's product by a window of the matrix, made at its first use, if `decodes_whole`.

        It keeps the scales decoded, four bytes for each row and column of the matrix.

        Raises:
            ValueError: the matrix has no such rows or columns.
            CodecError: a tile of these rows was left out, or the private data is malformed.
        """
        product = self._products.get(window)
        if product is None:
            container.check_window(self.header, window)
            tiles = self.tiles(window.first_row, window.first_row + window.rows)
            assert isinstance(self.codec, Codec)
            product = self.codec.product(self.stored(), tiles, window)
            if len(self._products) >= _MOST_PRODUCTS:
                self._products.clear()
            self._products[window] = product
        return product

    def forget_product(self, window: Window) -> None:
        """Free what `product` prepared for a window."""
        self._products.pop(window, None)

    def replace_tensors(self, other: "OpenedMatrix") -> None:
        """Take the tensors of another object, which have the same content."""
        self.tensors, self.host = other.tensors, other.host
        self._products.clear()  # they point into the former ones

    def release_host(self) -> None:
        """Free the host's copy of the container, which is not needed at the next use."""
        self.host = None

    @cached_property
    def _some_left_out(self) -> bool:
        """Whether some tiles were left out (`container.select_tiles`)."""
        return not self.header.tiles["payload_size"].all()

    @cached_property
    def has_cpu_alone(self) -> bool:
        """Whether the CPU multiplies by it, and the codec brings no decoder of its own for that."""
        return self.decodes_whole and not self.codec.decoders(torch.device("cpu"))

    @property
    def decodes_whole(self) -> bool:
        """Whether the codec decodes this matrix' tiles together (`BaseCodec.decodes_whole`)."""
        return self.codec.decodes_whole and self.header.across == 1

    def tiles(self, first_row: int, end_row: int) -> range:
        """Indices of the tiles that hold some rows.

        Raises:
            ValueError: the matrix has no such rows.
            CodecError: one of these tiles was left out (`container.select_tiles`).
        """
        header = self.header
        if not 0 <= first_row < end_row <= header.rows:
            raise ValueError(
                f"rows {first_row} to {end_row} of a matrix of {header.rows}x{header.cols}"
            )
        grid = header.blocks
        first, last = grid.band_of(first_row), grid.band_of(end_row - 1)
        tiles = range(first * grid.across, (last + 1) * grid.across)
        if self._some_left_out:
            missing = np.flatnonzero(header.tiles["payload_size"][tiles.start : tiles.stop] == 0)
            if len(missing):
                raise CodecError(
                    f"tile {tiles[int(missing[0])]} is not here: this is a slice of a weight, and "
                    f"its rows {first_row} to {end_row} were left out of it"
                )
        return tiles


def open_matrix(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_pre_scale: Tensor,
    *,
    arrays_checked: bool = False,
) -> OpenedMatrix:
    """Read and check everything except the tiles; again only if a tensor has changed.

    Args:
        qdata: uint8 (bytes,), the container.
        scale: uint8 (rows,) or (1,), scale codes.
        zero_point: float32 (rows,) or None.
        act_pre_scale: uint8 (cols,) or (1,), scale codes.
        arrays_checked: whether `check_arrays` was called for these four.

    Raises:
        CodecError: corrupt, from a newer format, or of a codec that is not available.
    """
    fingerprint = _fingerprint(qdata, scale, zero_point, act_pre_scale)
    key = id(qdata)
    known = _opened.get(key)
    if known is not None and known.tensor() is qdata:
        if fingerprint is not None and known.fingerprint == fingerprint:
            return known.matrix
    else:
        known = None
    if not arrays_checked:
        check_arrays(qdata, scale, zero_point, act_pre_scale)
    matrix = _open(qdata, scale, zero_point, act_pre_scale)
    if known is not None and known.matrix.header.raw == matrix.header.raw:
        # The same content in other tensors: keep the object, as cached weights belong to it.
        known.matrix.replace_tensors(matrix)
        matrix = known.matrix

    def forget(ref: weakref.ref[Tensor]) -> None:
        if key in _opened and _opened[key].tensor is ref:
            del _opened[key]

    _opened[key] = _Opened(weakref.ref(qdata, forget), fingerprint, matrix)
    return matrix


class _Opened(NamedTuple):
    tensor: weakref.ref[Tensor]
    fingerprint: tuple[int, ...] | None
    matrix: OpenedMatrix


_opened: dict[int, _Opened] = {}


def _fingerprint(*tensors: Tensor | None) -> tuple[int, ...] | None:
    """A value that changes when a tensor is written to; None if PyTorch does not count writes."""
    marks: tuple[int, ...] = ()
    for tensor in tensors:
        if tensor is not None:
            if tensor.is_inference():
                return None
            marks += tensor.data_ptr(), version_of(tensor)
    return marks


def _open(
    qdata: Tensor, scale: Tensor, zero_point: Tensor | None, act_pre_scale: Tensor
) -> OpenedMatrix:
    refuse_first_use(qdata.device)
    # Aliases: a reference to the tensors themselves would keep them alive.
    aliases = (
        qdata.detach(),
        scale.detach(),
        None if zero_point is None else zero_point.detach(),
        act_pre_scale.detach(),
    )
    host = aliases
    if not qdata.is_cpu:
        host = (
            aliases[0].cpu(),
            aliases[1].cpu(),
            None if aliases[2] is None else aliases[2].cpu(),
            aliases[3].cpu(),
        )
    header, codec = check_header(
        partial(bytes_of, host[0]),
        host[0].numel(),
        bytes_of(host[1]),
        None if host[2] is None else bytes_of(host[2]),
        bytes_of(host[3]),
    )
    return OpenedMatrix(header, codec, aliases, host)


_DTYPES = {name: getattr(torch, dtype) for name, dtype in ARRAYS.items()}


def check_arrays(*arrays: Tensor | None) -> None:
    """Reject arrays of a wrong type, dtype, shape or device; their contents are not checked.

    An expanded array (stride 0) would be copied to more memory than was stored.

    Args:
        arrays: qdata, scale, zero_point or None, act_pre_scale.

    Raises:
        CodecError: an array does not have one dimension, is not contiguous, has a wrong dtype, or
            is not on the device of qdata.
    """
    place: torch.device | None = None
    for (name, dtype), array in zip(_DTYPES.items(), arrays, strict=True):
        if array is None and name == "zero_point":
            continue
        if type(array) is not Tensor and type(array) is not torch.nn.Parameter:
            raise CodecError(f"{name} is {type(array).__name__}: allowed: torch.Tensor")
        if array.layout != torch.strided or array.dim() != 1 or array.dtype != dtype:
            kind = f"{array.layout}, {array.dtype}"
            raise CodecError(refused_array(name, kind, tuple(array.shape)))
        if not array.is_contiguous():
            raise CodecError(f"{name} has the stride {array.stride(0)}: allowed: 1")
        place = place or array.device
        if array.device != place:
            raise CodecError(f"{name} is on {array.device}, and qdata on {place}")


def verify_tiles(matrix: OpenedMatrix) -> Iterator[str]:
    """Check the checksum and the outliers of every tile that is present, without decoding.

    Returns:
        A message for each damaged tile.
    """
    data = matrix.stored().data
    for index in np.flatnonzero(matrix.header.tiles["payload_size"]).tolist():
        try:
            container.read_tile(data, matrix.header, index)
        except CodecError as error:
            yield str(error)


def as_array(tensor: Tensor) -> NDArray[Any]:
    """A tensor as an array; it shares memory with a contiguous tensor on the CPU."""
    host = tensor.detach().cpu().contiguous()
    _check_memory(host)
    # Tensor.numpy() would forbid FSDP to release it.
    return np.from_dlpack(host)


def bytes_of(tensor: Tensor, count: int | None = None) -> bytes:
    """A copy of the bytes of a contiguous CPU tensor, or of the first `count` of them.

    For a few bytes it is faster than `as_array`. `count` must not exceed the tensor's bytes.
    """
    _check_memory(tensor)
    count = tensor.nbytes if count is None else count
    return ctypes.string_at(tensor.data_ptr(), count) if count else b""


def _check_memory(tensor: Tensor) -> None:
    if tensor.untyped_storage().nbytes() < tensor.nbytes:
        raise CodecError("the memory of a bitstream was released, by FSDP for one")
