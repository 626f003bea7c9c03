"""Decoding for a device: to a tensor where the weight is used.

On a CUDA device there are three ways, the first that is there:

1. kernels of the codec's own decode a bitstream that lies on the device (resident.py);
2. a decoder of the device decodes the tiles' pictures (`codecs/device.py`), and the arithmetic from
   samples to weights is done there, with the roundings of the CPU: the result is the same, bit for
   bit;
3. the CPU's cores decode to pinned memory, from where the weight is copied in a stream of its own.

Nothing here waits for the device, but for the first picture of a kind, which is compared to the
CPU's. The second way and the third read the bitstream on the host, so they cannot be part of a CUDA
graph.
"""

from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchcodec_weights import container
from torchcodec_weights.codecs import device as devices
from torchcodec_weights.codecs.base import CodecError, SampleCodec
from torchcodec_weights.codecs.device import DeviceDecoder, DeviceDecoderError, Samples
from torchcodec_weights.codecs.ectcq import ECTCQ
from torchcodec_weights.codecs.ectcq.gpu import DTYPES, MAX_TOKENS
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.decoding import (
    Matrix,
    Window,
    capturing,
    check_window,
    cut,
    decode_matrix,
    decode_rows,
    decode_tile_rows,
    exact_weights,
)
from torchcodec_weights.resident import resident_matrix, why_not_resident
from torchcodec_weights.setting import Setting

_GROUP = 64  # tiles whose samples are held at a time


def decode_on(
    matrix: Matrix,
    window: Window,
    dtype: torch.dtype,
    device: torch.device,
    threads: int | None = None,
) -> Tensor:
    """Decode a part of a matrix for a device, by the decoder that is best there.

    Args:
        threads: how many to use on the CPU, by default as many as PyTorch.

    Returns:
        (window.rows, window.cols) of `dtype` on `device`, contiguous. On a CUDA device the current
        stream may use it at once, others must wait for that.

    Raises:
        CodecError: a tile is corrupt, or a CUDA graph is captured and the codec needs the host.
        CodecUnavailableError: `use_decoder` forces a decoder that cannot be taken.
    """
    if device.type != "cuda":
        return decode_matrix(matrix, window, dtype, threads).to(device)
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    # What is decoded may be kept, and used in another mode than the caller's.
    with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
        resident = resident_matrix(matrix, device)
        if resident is not None:
            _check(matrix, window)
            rows = resident.decode(window.first_row, window.first_row + window.rows, dtype)
            return cut(rows, 0, window)
        _refuse_capture(matrix, device)
        decoder = _select(matrix, window, device)
        if decoder is not None:
            try:
                return decode_pictures(matrix, window, dtype, device, decoder)
            except DeviceDecoderError as error:
                if devices.chosen(matrix.codec.name) == "cuda":
                    raise
                devices.give_up(matrix.codec.name, device, str(error))
                devices.warn_once(matrix.codec.name, str(error))
        rows, offset = decode_tile_rows(matrix, window, dtype, threads, _pinned)
        return cut(_upload(rows, device), offset, window)


def multiply_on(matrix: Matrix, window: Window, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """x @ W.T + bias without ever storing W, on a CUDA device whose kernels can do that.

    Args:
        x: (tokens, window.cols).
        bias: (window.rows,) of x's dtype, or None.

    Returns:
        (tokens, window.rows) of x's dtype; None where W is to be decoded instead: for many tokens,
        other devices, codecs and dtypes, and rows that do not suit the kernels.

    Raises:
        CodecError: a tile is corrupt, or a CUDA graph is captured and the weight was never used.
    """
    if not 1 <= len(x) <= MAX_TOKENS or x.dtype not in DTYPES:
        return None
    resident = resident_matrix(matrix, x.device)
    if resident is None or not resident.whole_rows:
        return None
    _check(matrix, window)
    end_row = window.first_row + window.rows
    with torch.cuda.device(x.device), torch.no_grad():
        return resident.multiply(x, window.first_row, end_row, window.first_col, bias)


def decode_rows_on(matrix: Matrix, window: Window, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a part of a matrix, on the device of the indices.

    Args:
        indices: integers of any shape. The host waits for them, as which tiles to decode depends on
            them, unless kernels of the device find the rows.

    Returns:
        (indices.numel(), window.cols) of `dtype`.

    Raises:
        IndexError: an index lies outside of the window's rows. Kernels of the device end with an
            error instead that CUDA reports later, as PyTorch's own embedding does.
        CodecError: a tile is corrupt, or a CUDA graph is captured and the codec needs the host.
    """
    device = indices.device
    if device.type != "cuda":
        return decode_rows(matrix, window, indices.cpu(), dtype).to(device)
    resident = resident_matrix(matrix, device)
    if resident is not None and resident.whole_rows:
        _check(matrix, window)
        numbers = indices.reshape(-1).to(torch.int64)
        rows = resident.gather(numbers, window.first_row, window.rows, dtype)
        return rows[:, window.first_col : window.first_col + window.cols]
    _refuse_capture(matrix, device)
    rows = decode_rows(matrix, window, indices.cpu(), dtype)
    with torch.cuda.device(device), torch.inference_mode(False):
        return _upload(rows.pin_memory(), device)


def decode_complete(
    matrix: Matrix,
    window: Window,
    dtype: torch.dtype,
    device: torch.device,
    threads: int | None = None,
) -> Tensor:
    """As `decode_on`, but in a stream of its own, and done: to be kept, and used in any stream.

    The calling thread waits for that stream, not for the device. Users must call `use_here`.
    """
    if device.type != "cuda":
        return decode_on(matrix, window, dtype, device, threads)
    stream = _stream(device, "decode")
    with torch.cuda.device(device), torch.cuda.stream(stream):
        weight = decode_on(matrix, window, dtype, device, threads)
        stream.record_event(torch.cuda.Event(blocking=True)).synchronize()
    return weight


def use_here(weight: Tensor) -> Tensor:
    """Tell the allocator that the current stream uses a weight that was made in another one."""
    if weight.is_cuda:
        weight.record_stream(torch.cuda.current_stream(weight.device))
    return weight


def matrix_decoder_name(matrix: Matrix, device: torch.device) -> str:
    """What decodes a matrix for a device, for a reader."""
    if isinstance(matrix.codec, ECTCQ) and device.type == "cuda":
        reason = why_not_resident(matrix, device)
        decoders = matrix.codec.info().decoders
        return devices.uploaded(decoders["cpu"], reason) if reason else decoders["cuda"]
    header = matrix.header
    present = np.flatnonzero(header.tiles["payload_size"])
    start = int(header.offsets[present[0]])
    payload = matrix.stored().data[start : start + int(header.tiles[present[0]]["payload_size"])]
    return devices.decoder_name(matrix.codec, device, bytes(payload))


class use_decoder(Setting):  # noqa: N801 - used as a function
    """Force what decodes a codec's weights on CUDA devices, or leave the choice to the package.

    Takes effect at once and for the whole process; as a context manager it restores the former
    choice at the end. What is decoded already (`decoded_cache`) stays as it is.

    Args:
        codec: its name.
        decoder: "cpu", which decodes on the CPU's cores and uploads; "cuda", the decoder of the
            device, with an error where that is not possible; None, the default, which takes the
            device's where it is there and gives exactly what the CPU gives, and the CPU otherwise.

    Raises:
        ValueError: there is no such codec, or no such decoder of it.
    """

    def __init__(self, codec: str, decoder: str | None) -> None:
        kind = get_codec(codec)
        hardware = isinstance(kind, SampleCodec) and kind.device_decoder is not None
        own = isinstance(kind, ECTCQ)
        allowed = ("cpu", "cuda", None) if hardware or own else ("cpu", None)
        if decoder not in allowed:
            raise ValueError(
                f"decoder={decoder!r} with codec {codec!r}: allowed: "
                f"{', '.join(map(repr, allowed))}"
            )
        super().__init__(partial(devices.choose, codec, devices.chosen(codec)))
        devices.choose(codec, decoder)


def _check(matrix: Matrix, window: Window) -> None:
    """Reject a window that a matrix does not have, or whose tiles were left out of it."""
    check_window(matrix, window)
    matrix.tiles(window.first_row, window.first_row + window.rows)


def _refuse_capture(matrix: Matrix, device: torch.device) -> None:
    if capturing(device):
        raise CodecError(
            f"a weight in {matrix.codec.name!r} cannot be decoded while a CUDA graph is captured, "
            "as that takes the host: run the model once before, under a decoded_cache(max_bytes) "
            "that has room for all decoded weights"
        )


def _select(matrix: Matrix, window: Window, device: torch.device) -> DeviceDecoder | None:
    """The device's decoder, if it takes the tiles of a window."""
    if not isinstance(matrix.codec, SampleCodec) or matrix.codec.device_decoder is None:
        return None
    header = matrix.header
    tiles = matrix.tiles(window.first_row, window.first_row + window.rows)
    # Sides of tiles differ by one at most: the smallest and the largest speak for all.
    areas = [header.blocks[index].rows * header.blocks[index].cols for index in tiles]
    data = matrix.stored().data
    decoder = None
    for position in {int(np.argmin(areas)), int(np.argmax(areas))}:
        payload, _ = container.read_tile(data, header, tiles[position])
        decoder = devices.select(matrix.codec, payload, device)
        if decoder is None:
            return None
    return decoder


def decode_pictures(
    matrix: Matrix,
    window: Window,
    dtype: torch.dtype,
    device: torch.device,
    decoder: DeviceDecoder,
) -> Tensor:
    """Decode a part of a matrix of a `SampleCodec` by a decoder of pictures on a device.

    Every tile's checksum is verified before it is decoded. The first picture of each size and depth
    is decoded on the CPU as well, once in a process, unless the decoder says that it differs.

    Returns:
        (window.rows, window.cols) of `dtype` on `device`, contiguous.

    Raises:
        CodecError: a tile is corrupt.
        DeviceDecoderError: the decoder failed, or its samples are not those of the CPU.
    """
    header, codec = matrix.header, matrix.codec
    assert isinstance(codec, SampleCodec)
    check_window(matrix, window)
    tiles = matrix.tiles(window.first_row, window.first_row + window.rows)
    first, end = header.blocks[tiles.start].first_row, header.blocks[tiles.stop - 1].end_row
    stored = matrix.stored()
    weight = torch.empty(end - first, header.cols, dtype=dtype, device=device)
    rows, cols = _to(stored.row_scale, device), _to(stored.col_scale, device)
    zero_point = None if stored.zero_point is None else _to(stored.zero_point, device)
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
            if decoder.exact(codec):
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
            )
            exact[index] = outliers
    places, values = exact_weights(header, exact)
    if len(places):
        where = _to(places - first * header.cols, device)
        weight.view(-1)[where] = (
            _to(values.view(torch.uint8).numpy(), device).view(values.dtype).to(dtype)
        )
    return cut(weight, window.first_row - first, window)


def restore_tile(
    picture: Samples,
    unit: float,
    row_scale: Tensor,
    col_scale: Tensor,
    zero_point: Tensor | None,
    out: Tensor,
) -> None:
    """Samples to weights, in the order and with the roundings of `decoding.decode_matrix`.

    Args:
        picture: at least as many samples as the tile has weights, in row-major order.
        row_scale, col_scale: float32 (rows,) or (1,) and (cols,) or (1,).
        zero_point: float32 (rows,) or None.
        out: (rows, cols), where the weights go.
    """
    samples = picture.values.reshape(-1)[: out.numel()]
    # One operation at a time: each rounds once, and none is contracted with the next.
    tile = samples.to(torch.float32).view(out.shape)
    tile -= 2 ** (picture.depth - 1)
    tile *= unit
    tile *= row_scale[:, None]
    tile *= col_scale[None, :]
    if zero_point is not None:
        tile += zero_point[:, None]
    out.copy_(tile)


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
        raise DeviceDecoderError(f"{decoder.name} returns other samples than the CPU's decoder")
    _verified.add(key)


def _to(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array on a device. Pinned memory is kept by its allocator until the copy is done."""
    tensor = torch.from_numpy(np.array(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _pinned(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty(rows, cols, dtype=dtype, pin_memory=True)


def _upload(rows: Tensor, device: torch.device) -> Tensor:
    """Copy from pinned memory in a stream of its own; the current stream waits for it."""
    current, side = torch.cuda.current_stream(device), _stream(device, "upload")
    with torch.cuda.stream(side):
        # Memory of that stream: it need not wait for what the current one still computes.
        copied = rows.to(device, non_blocking=True)
        done = side.record_event()
    current.wait_event(done)
    copied.record_stream(current)
    return copied


@cache
def _stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
