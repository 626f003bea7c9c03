"""Decoders of pictures on a CUDA device: samples become weights there, with the CPU's results.

The host verifies each tile's checksum and headers; the samples never leave the device. The tiles of
a group are decoded into one buffer and restored together. The arithmetic rounds as on the CPU, so
the weights are the same, bit for bit. The bitstream is read on the host at each use, so this cannot
be captured in a CUDA graph.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from torchcodec_weights.codecs.decoder import DecodableMatrix, Decoder
from torchcodec_weights.codecs.headers.fields import Picture
from torchcodec_weights.codecs.pictures import DeviceDecoder, SampleCodec, Samples
from torchcodec_weights.codecs.records import StoredMatrix
from torchcodec_weights.decoders.cpu import cut
from torchcodec_weights.decoders.transfer import to_device
from torchcodec_weights.errors import DecoderError
from torchcodec_weights.format import container
from torchcodec_weights.format.tiling import Block, Window

# Tiles that are decoded together, and their weights, each of which takes up to twelve bytes beside
# the result. Most tiles have 2^18.
_GROUP = 64
_GROUP_WEIGHTS = 2**24

_Kind = tuple[torch.device, tuple[int, int]]  # a device, and rows and columns of a tile


class PictureDecoder(Decoder):
    """A `Decoder` of one codec's matrices, by a `DeviceDecoder` of its pictures."""

    def __init__(self, codec: SampleCodec, device_decoder: DeviceDecoder) -> None:
        self.name = device_decoder.name
        self._codec, self._decoder = codec, device_decoder
        self._refusals: WeakKeyDictionary[DecodableMatrix, dict[_Kind, str | None]] = (
            WeakKeyDictionary()
        )

    def missing(self, device: torch.device) -> str | None:
        return self._decoder.missing(self._codec, device)

    def refusal(self, matrix: DecodableMatrix, window: Window, device: torch.device) -> str | None:
        header = matrix.header
        tiles = matrix.tiles(window.first_row, window.first_row + window.rows)
        blocks = header.blocks[tiles.start : tiles.stop]
        areas = [block.rows * block.cols for block in blocks]
        known = self._refusals.setdefault(matrix, {})
        # Rows and columns of tiles differ by one at most, so two tiles are enough to check. What is
        # found is remembered: `decode` reads and checks every header, at each use.
        for position in {int(np.argmin(areas)), int(np.argmax(areas))}:
            shape = blocks[position].rows, blocks[position].cols
            if (device, shape) not in known:
                payload, _ = container.read_tile(matrix.stored().data, header, tiles[position])
                picture = self._codec.check_header(payload, shape)
                known[device, shape] = self._decoder.refusal(self._codec, picture, device)
            reason = known[device, shape]
            if reason is not None:
                return reason
        return None

    def decode(
        self, matrix: DecodableMatrix, window: Window, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return decode_pictures(self._codec, matrix, window, dtype, device, self._decoder)


@cache
def picture_decoder(codec: SampleCodec, device_decoder: DeviceDecoder) -> PictureDecoder:
    """The `PictureDecoder` of a codec and a `DeviceDecoder`, the same object at every call."""
    return PictureDecoder(codec, device_decoder)


def decode_pictures(
    codec: SampleCodec,
    matrix: DecodableMatrix,
    window: Window,
    dtype: torch.dtype,
    device: torch.device,
    decoder: DeviceDecoder,
) -> Tensor:
    """Decode a window of a matrix of a `SampleCodec` by a decoder of pictures on a device.

    Every tile's checksum is verified and its headers are read before it is decoded. The first
    picture of each size and depth is decoded on the CPU as well, once in a process, and compared.

    Returns:
        (window.rows, window.cols) of `dtype` on `device`, contiguous.

    Raises:
        CodecError: a tile is corrupt.
        DecoderError: the decoder failed, or its samples differ from the CPU's.
    """
    header = matrix.header
    container.check_window(matrix.header, window)
    tiles = matrix.tiles(window.first_row, window.first_row + window.rows)
    first, end = header.blocks[tiles.start].first_row, header.blocks[tiles.stop - 1].end_row
    stored = matrix.stored()
    weight = torch.empty(end - first, header.cols, dtype=dtype, device=device)
    vectors = _Vectors.of(stored, device)
    outliers: dict[int, container.Outliers] = {}
    most = max(1, min(_GROUP, _GROUP_WEIGHTS // header.blocks.largest))
    # Groups of like size: one tile by itself would leave all engines but one idle.
    step = -(-len(tiles) // -(-len(tiles) // most))
    for start in range(0, len(tiles), step):
        group = tiles[start : start + step]
        contents = [container.read_tile(stored.data, header, index) for index in group]
        outliers.update(zip(group, (found for _, found in contents), strict=True))
        blocks = header.blocks[group.start : group.stop]
        samples = _decode_group(
            codec, decoder, [payload for payload, _ in contents], blocks, device
        )
        # Tiles below each other have the same columns, and are restored together.
        for across in range(min(header.across, len(group))):
            positions = range(across, len(group), header.across)
            strip = _Strip.of(matrix, stored, group, positions, device)
            restore_strip(samples, strip, vectors, weight[strip.first_row - first :])
        del samples  # before the next group's are made
    places, values = container.exact_weights(header, outliers)
    if len(places):
        where = to_device(places - first * header.cols, device)
        stored_dtype = getattr(torch, header.dtype)
        weight.view(-1)[where] = to_device(values, device).view(stored_dtype)[:, 0].to(dtype)
    return cut(weight, window.first_row - first, window)


def _decode_group(
    codec: SampleCodec,
    decoder: DeviceDecoder,
    payloads: Sequence[bytes],
    blocks: Sequence[Block],
    device: torch.device,
) -> Samples:
    """Decode the pictures of some tiles, after their headers were checked."""
    pictures = [
        codec.check_header(payload, (block.rows, block.cols))
        for payload, block in zip(payloads, blocks, strict=True)
    ]
    for picture in set(pictures):
        if picture.depth != pictures[0].depth:
            raise DecoderError("tiles of one matrix have pictures of different depths")
        reason = decoder.refusal(codec, picture, device)
        if reason is not None:
            raise DecoderError(reason)
    samples = decoder.decode(codec, payloads, pictures, device)
    for number, picture in enumerate(pictures):
        key = codec.name, decoder.name, picture, device
        if key not in _verified:
            _verify(codec, decoder, payloads[number], picture, samples, number)
            _verified.add(key)
    return samples


class _Vectors(NamedTuple):
    """Vectors of a matrix on a device, as in `StoredMatrix`."""

    row_scale: Tensor
    col_scale: Tensor
    zero_point: Tensor | None
    column_places: Tensor | None  # int64 (cols,): where each column lies in a tile

    @classmethod
    def of(cls, stored: StoredMatrix, device: torch.device) -> "_Vectors":
        order = stored.column_order
        return cls(
            to_device(stored.row_scale, device),
            to_device(stored.col_scale, device),
            None if stored.zero_point is None else to_device(stored.zero_point, device),
            None if order is None else to_device(np.argsort(order), device),
        )


class _Strip(NamedTuple):
    """Tiles below each other, of one group, on a device.

    Attributes:
        first_row, end_row, first_col, end_col: of the matrix.
        height: rows of the highest tile.
        places: int64 (2, rows), for each row the tile's position in the group and the row's in the
            tile.
        units: float32 (rows,), of the tile that holds the row.
    """

    first_row: int
    end_row: int
    first_col: int
    end_col: int
    height: int
    places: Tensor
    units: Tensor

    @classmethod
    def of(
        cls,
        matrix: DecodableMatrix,
        stored: StoredMatrix,
        group: range,
        positions: range,
        device: torch.device,
    ) -> "_Strip":
        """The strip of the tiles at some positions of a group."""
        blocks = [matrix.header.blocks[group[position]] for position in positions]
        heights = [block.rows for block in blocks]
        orders = [matrix.row_order(block.first_row, block.end_row) for block in blocks]
        places = np.empty((2, sum(heights)), np.int64)
        places[0] = np.repeat(positions, heights)
        places[1] = np.concatenate(
            [
                np.arange(height) if order is None else np.argsort(order)
                for height, order in zip(heights, orders, strict=True)
            ]
        )
        units = np.repeat(stored.units[group.start : group.stop][positions], heights)
        return cls(
            blocks[0].first_row,
            blocks[-1].end_row,
            blocks[0].first_col,
            blocks[0].end_col,
            max(heights),
            to_device(places, device),
            to_device(units, device),
        )


def restore_strip(samples: Samples, strip: _Strip, vectors: _Vectors, out: Tensor) -> None:
    """Samples to weights, in the order and with the roundings of `cpu.decode_matrix`.

    Args:
        samples: of a group of tiles.
        out: (at least the strip's rows, all columns), receives the strip's weights.
    """
    rows, cols = slice(strip.first_row, strip.end_row), slice(strip.first_col, strip.end_col)
    width = strip.end_col - strip.first_col
    # The picture of a lower tile may end within the last row, which no index is of.
    tiles = samples.values[:, : strip.height * width].unflatten(1, (strip.height, width))
    tile, row = strip.places
    if vectors.column_places is None:
        picked = tiles[tile, row]
    else:
        picked = tiles[tile[:, None], row[:, None], vectors.column_places]
    # One operation at a time: each rounds once, and none is contracted with the next.
    z = picked.to(torch.float32)
    z -= 2 ** (samples.depth - 1)
    z *= strip.units[:, None]
    z *= _part(vectors.row_scale, rows)[:, None]
    z *= _part(vectors.col_scale, cols)
    if vectors.zero_point is not None:
        z += vectors.zero_point[rows, None]
    out[: len(z), cols] = z


def _part(scale: Tensor, part: slice) -> Tensor:
    """Some scales of rows or columns, or the one that serves all."""
    return scale if len(scale) == 1 else scale[part]


_verified: set[tuple[str, str, Picture, torch.device]] = set()


def _verify(
    codec: SampleCodec,
    decoder: DeviceDecoder,
    payload: bytes,
    picture: Picture,
    samples: Samples,
    number: int,
) -> None:
    """Compare one picture of `samples` to the CPU's."""
    expected, depth = codec.decode_checked(payload, picture.size)
    found = samples.values[number, : picture.height * picture.width].view(picture.size)
    if samples.depth != depth or not np.array_equal(found.cpu().numpy(), expected):
        raise DecoderError(f"{decoder.name} returns other samples than the CPU's decoder")
