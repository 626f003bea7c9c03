"""The lossless codec: planes of bits, coded by rANS where that gains (docs/bitstream.md).

Coding the exponents of trained weights apart from mantissas, and leaving these as they are, is what
ZipNN (Hershcovitch et al., arXiv 2411.05239) and DFloat11 (Zhang et al., arXiv 2504.11651) do with
Huffman codes. Duda, "Asymmetric numeral systems", arXiv 1311.2540; Giesen, "Interleaved entropy
coders", arXiv 1402.3392.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.base import LosslessCodec
from torchcodec_weights.codecs.common import compiled
from torchcodec_weights.codecs.common.compiled import matrix_view
from torchcodec_weights.codecs.lossless import kernels
from torchcodec_weights.codecs.lossless.model import choose
from torchcodec_weights.codecs.records import BitArray, CodecInfo, StoredMatrix


class Lossless(LosslessCodec):
    """Keeps every bit of a weight, in about two thirds of the size of bfloat16."""

    name = "lossless"
    # Large enough that the first states of streams take next to nothing, small enough that a plane
    # with a table of its own adapts to rows that differ.
    tile_weights = 2**17

    def info(self) -> CodecInfo:
        return compiled.info(self.name, lossy=False)

    def prepare_bits(self, tiles: Sequence[BitArray], dtype: str) -> bytes:
        counts = np.zeros(256 if dtype == "float16" else 2048, np.uint64)
        for tile in tiles:
            kernels.count(tile, dtype, counts)
        return choose(counts, dtype)

    def encode_bits(
        self, tile: BitArray, dtype: str, private: bytes
    ) -> tuple[bytes, NDArray[np.int64]]:
        return kernels.encode(tile, dtype, private)

    def decode_tiles(
        self, matrix: StoredMatrix, tiles: range, out: int, dtype: str, threads: int
    ) -> None:
        kernels.decode_matrix(matrix.private, matrix_view(matrix, tiles), out, dtype, threads)
