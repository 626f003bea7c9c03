"""Decoders of pictures on a CUDA device: samples become weights there, with the CPU's results.

The host verifies each tile's checksum and headers; the samples never leave the device. The
arithmetic rounds as on the CPU, so the weights are the same, bit for bit. The bitstream is read on
the host at each use, so this cannot be captured in a CUDA graph.
"""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchcodec_weights.codecs.decoder import DecodableMatrix, Decoder
from torchcodec_weights.codecs.pictures import DeviceDecoder, SampleCodec, Samples
from torchcodec_weights.decoders.cpu import cut
from torchcodec_weights.decoders.transfer import to_device
from torchcodec_weights.errors import DecoderError
from torchcodec_weights.format import container
from torchcodec_weights.format.tiling import Window

_GROUP = 64  # tiles whose samples are held at a time


class PictureDecoder(Decoder):
    """A `Decoder` of one codec's matrices, by a `DeviceDecoder` of its pictures."""

    def __init__(self, codec: SampleCodec, device_decoder: DeviceDecoder) -> None:
        self.name = device_decoder.name
        self._codec, self._decoder = codec, device_decoder

    def missing(self, device: torch.device) -> str | None:
        return self._decoder.missing(self._codec, device)

    def refusal(self, matrix: DecodableMatrix, window: Window, device: torch.device) -> str | None:
        header = matrix.header
        tiles = matrix.tiles(window.first_row, window.first_row + window.rows)
        # Rows and columns of tiles differ by one at most, so two tiles are enough to check.
        areas = [header.blocks[index].rows * header.blocks[index].cols for index in tiles]
        data = matrix.stored().data
        for position in {int(np.argmin(areas)), int(np.argmax(areas))}:
            payload, _ = container.read_tile(data, header, tiles[position])
            reason = self._decoder.refusal(self._codec, payload, device)
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

    Every tile's checksum is verified before it is decoded. The first picture of each size and depth
    is decoded on the CPU as well, once in a process, and compared.

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
    rows, cols = to_device(stored.row_scale, device), to_device(stored.col_scale, device)
    zero_point = None if stored.zero_point is None else to_device(stored.zero_point, device)
    columns = _place(stored.column_order, device)
    exact: dict[int, container.Outliers] = {}
    for start in range(0, len(tiles), _GROUP):
        group = tiles[start : start + _GROUP]
        contents = [container.read_tile(stored.data, header, index) for index in group]
        payloads = [payload for payload, _ in contents]
        for index, payload in zip(group, payloads, strict=True):
            block = header.blocks[index]
            codec.check_header(payload, (block.rows, block.cols))
        pictures = decoder.decode(codec, payloads, device)
        for index, picture, (payload, outliers) in zip(group, pictures, contents, strict=True):
            block = header.blocks[index]
            codec.check_size(picture.values.shape, (block.rows, block.cols))
            _verify(codec, decoder, payload, picture)
            restore_tile(
                picture,
                float(stored.units[index]),
                rows if len(rows) == 1 else rows[block.first_row : block.end_row],
                cols if len(cols) == 1 else cols[block.first_col : block.end_col],
                None if zero_point is None else zero_point[block.first_row : block.end_row],
                weight[block.first_row - first : block.end_row - first][
                    :, block.first_col : block.end_col
                ],
                (_place(matrix.row_order(block.first_row, block.end_row), device), columns),
            )
            exact[index] = outliers
    places, values = container.exact_weights(header, exact)
    if len(places):
        where = to_device(places - first * header.cols, device)
        stored_dtype = getattr(torch, header.dtype)
        weight.view(-1)[where] = to_device(values, device).view(stored_dtype)[:, 0].to(dtype)
    return cut(weight, window.first_row - first, window)


def restore_tile(
    picture: Samples,
    unit: float,
    row_scale: Tensor,
    col_scale: Tensor,
    zero_point: Tensor | None,
    out: Tensor,
    places: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Samples to weights, in the order and with the roundings of `cpu.decode_matrix`.

    Args:
        picture: at least as many samples as the tile has weights, in row-major order.
        row_scale, col_scale: float32 (rows,) or (1,) and (cols,) or (1,).
        zero_point: float32 (rows,) or None.
        out: (rows, cols), receives the weights.
        places: int64 (rows,) and (cols,), where each row and column lies in the picture; None if
            they are not sorted.
    """
    samples = picture.values.reshape(-1)[: out.numel()]
    # One operation at a time: each rounds once, and none is contracted with the next.
    tile = samples.to(torch.float32).view(out.shape)
    tile -= 2 ** (picture.depth - 1)
    tile *= unit
    if places[1] is not None:
        tile = tile[:, places[1]]
    if places[0] is not None:
        tile = tile[places[0]]
    tile *= row_scale[:, None]
    tile *= col_scale[None, :]
    if zero_point is not None:
        tile += zero_point[:, None]
    out.copy_(tile)


def _place(order: NDArray[np.uint32] | None, device: torch.device) -> Tensor | None:
    """Where each row or column lies: the inverse of an order, int64, on a device."""
    return None if order is None else to_device(np.argsort(order), device)


_verified: set[tuple[str, str, tuple[int, ...], int, torch.device]] = set()


def _verify(codec: SampleCodec, decoder: DeviceDecoder, payload: bytes, picture: Samples) -> None:
    """Compare a picture to the CPU's, if it is the first of its size and depth."""
    values, depth = picture
    key = codec.name, decoder.name, tuple(values.shape), depth, values.device
    if key in _verified:
        return
    expected, expected_depth = codec.decode_checked(payload, (values.shape[0], values.shape[1]))
    found = values.cpu().numpy()
    if depth != expected_depth or not np.array_equal(found, expected):
        raise DecoderError(f"{decoder.name} returns other samples than the CPU's decoder")
    _verified.add(key)
