"""What can be seen of a weight: the distribution of its values, and its first tile as a picture."""

from math import sqrt

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchcodec_weights.codecs.pictures import SampleCodec
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.format.container import read_tile
from torchcodec_weights.matrix.opened import as_array
from torchcodec_weights.pages.model import Histogram, Picture
from torchcodec_weights.pages.png import png
from torchcodec_weights.tensor import CodecTensor

_MOST_WEIGHTS = 2**22
"""Of a larger weight the first rows are decoded, for the time that it takes."""
_BINS = 64
_DEVIATIONS = 4.0
"""Both ends of a histogram, in root mean squares, and of a picture's brightness."""
_SIDE = 128
"""Height and width of what is shown of a picture, in samples."""


def histogram(weight: CodecTensor, original: Tensor | None) -> Histogram:
    """The distribution of a decoded weight and of what it was before, in the same bins.

    Args:
        weight: of any shape; of more than 2^22 weights the first rows are taken.
        original: of the same shape; None if it is not known.

    Raises:
        CodecError: a tile is corrupt, or its codec is not available.
    """
    rows = max(1, _MOST_WEIGHTS * len(weight) // weight.numel())
    after = _values(weight[:rows])
    before = None if original is None else _values(original[:rows])
    measured = after if before is None else before
    limit = _DEVIATIONS * sqrt(float(np.mean(np.square(measured, dtype=np.float64)))) or 1.0
    return Histogram(
        limit, _shares(after, limit), None if before is None else _shares(before, limit)
    )


def _values(weight: Tensor) -> NDArray[np.float32]:
    dense = weight.dequantize() if isinstance(weight, CodecTensor) else weight
    values: NDArray[np.float32] = dense.detach().float().cpu().numpy().reshape(-1)
    return values


def _shares(values: NDArray[np.float32], limit: float) -> tuple[float, ...]:
    counts, _ = np.histogram(values, _BINS, (-limit, limit))
    return tuple((counts / values.size).tolist())


def picture(weight: CodecTensor) -> Picture | None:
    """The first tile of a weight as its codec decodes it; None if its tiles are no pictures.

    Raises:
        CodecError: the tile is corrupt, or its codec is not available.
    """
    header, codec = weight.header, get_codec(weight.codec)
    if not isinstance(codec, SampleCodec):
        return None
    index = int(np.flatnonzero(header.tiles["payload_size"])[0])
    payload, _ = read_tile(as_array(weight.qdata).data, header, index)
    block = header.blocks[index]
    size = codec.check_header(payload, (block.rows, block.cols)).size
    frame, depth = codec.decode_checked(payload, size)
    samples = frame[:_SIDE, :_SIDE].astype(np.float32) - 2 ** (depth - 1)
    unit = 127 / (_DEVIATIONS * (float(np.sqrt(np.mean(np.square(samples)))) or 1.0))
    gray = np.clip(np.rint(samples * unit + 128), 0, 255).astype(np.uint8)
    caption = (
        f"The first tile as {codec.name} decodes it: the top left {gray.shape[0]} × "
        f"{gray.shape[1]} samples of a frame of {size[0]} × {size[1]}, {depth} bits each, of "
        f"{len(payload):,} bytes. Mid-gray is 0; black and white are {_DEVIATIONS:g} standard "
        "deviations."
    )
    return Picture(png(gray), caption)
