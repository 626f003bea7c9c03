"""The lossless codec beside others: size and speed on all matrices of two real models.

    pip install zstandard && pip install --no-deps zipnn==0.5.4
    python benchmarks/lossless.py --json benchmarks/results/lossless.json

- `lossless`: everything counted, as `codec_weight_only` stores it.
- `zipnn`: ZipNN's own defaults and one thread, a stream for each matrix; left out where it is not
  installed, as is `zstd`, at level 3.
- `entropy`: what an ideal code for the exponents of each matrix takes, with signs and mantissas as
  they are; no tables counted.
- `huffman`: the same with Huffman's code for the exponents. For bfloat16 this is the rate of
  DFloat11, less its tables and the places where its threads begin: DFloat11 itself needs CUDA.

Weights are those of all-MiniLM-L6-v2, float32, and SmolLM2-135M, which its package holds in 4 bits
and transformers makes float32 of: cast to each dtype. Speeds are in GB of dense weight per second
on one core, best and median of several turns over all matrices. `decode` makes a new tensor, `into`
decodes into memory that is there, as a product of a few tiles at a time does.
"""

import heapq
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from common import machine, parser, seconds, write
from numpy.typing import NDArray
from torch import Tensor

from torchcodec_weights import CodecTensor, codec_weight_only
from torchcodec_weights.codecs.lossless import Lossless
from torchcodec_weights.decoders.cpu import decode_matrix
from torchcodec_weights.evaluation.models import load_smollm2, minilm_weights
from torchcodec_weights.evaluation.rows import Row
from torchcodec_weights.format.dtypes import dtype_name
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.opened import OpenedMatrix, open_matrix

try:
    from zipnn import ZipNN
except ImportError:
    ZipNN = None
try:
    import zstandard
except ImportError:
    zstandard = None

FIELDS = {torch.float32: (8, 23), torch.bfloat16: (8, 7), torch.float16: (5, 10)}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=5)
    options.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL"
    )
    args = options.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for model in args.models:
        weights = MODELS[model]()
        for dtype in FIELDS:
            cast = [weight.to(dtype).contiguous() for weight in weights]
            for measured in _methods(cast, args.turns):
                row = {"model": model, "dtype": dtype_name(dtype), **measured, "machine": machine()}
                rows.append(row)
                _show(row)
    write(args.json, rows)


def _minilm() -> list[Tensor]:
    return [w for w in minilm_weights().values() if w.dim() == 2 and w.is_floating_point()]


def _smollm2() -> list[Tensor]:
    return [p.data for p in load_smollm2()[0].parameters() if p.dim() == 2]


MODELS = {"MiniLM": _minilm, "SmolLM2": _smollm2}


def _show(row: Row) -> None:
    speeds = "".join(
        f"  {name} {row[name]['best']:.2f} / {row[name]['median']:.2f}"
        for name in ("encode", "decode", "into")
        if name in row
    )
    print(
        f"{row['model']:8} {row['dtype']:9} {row['method']:9} {row['bits']:8.4f} bits "
        f"{100 * row['share']:6.2f} %{speeds}",
        flush=True,
    )


def _methods(weights: Sequence[Tensor], turns: int) -> list[Row]:
    rows = [_lossless(weights, turns)]
    if ZipNN is not None:
        rows.append(_zipnn(weights, turns))
    if zstandard is not None:
        rows.append(_zstd(weights, turns))
    entropy = huffman = 0.0
    for weight in weights:
        counts, rest = _exponents(weight)
        entropy += weight.numel() * (rest + _entropy(counts))
        huffman += weight.numel() * rest + _huffman_bits(counts)
    rows.append(_row("entropy", weights, entropy / 8))
    rows.append(_row("huffman", weights, huffman / 8))
    return rows


def _row(method: str, weights: Sequence[Tensor], stored: float, **times: list[float]) -> Row:
    dense = sum(weight.nbytes for weight in weights)
    speeds = {
        name: {"best": dense / min(all_) / 1e9, "median": dense / statistics.median(all_) / 1e9}
        for name, all_ in times.items()
    }
    count = sum(weight.numel() for weight in weights)
    return {"method": method, "bits": 8 * stored / count, "share": stored / dense, **speeds}


def _lossless(weights: Sequence[Tensor], turns: int) -> Row:
    config = codec_weight_only("lossless")
    pool = ThreadPoolExecutor(1)
    coded, encode = seconds(lambda: [CodecTensor.from_hp(w, config, pool) for w in weights], turns)
    matrices = [open_matrix(*c.coded) for c in coded]
    for matrix, weight in zip(matrices, weights, strict=True):
        decoded = _decode(matrix, weight.dtype)
        assert torch.equal(decoded.view(torch.uint8), weight.view(torch.uint8))
    dtype = weights[0].dtype
    _, decode = seconds(lambda: [_decode(m, dtype).shape for m in matrices], turns)
    buffer = torch.zeros(max(weight.numel() for weight in weights), dtype=dtype)
    into_buffer = partial(_into, buffer=buffer)
    _, into = seconds(lambda: list(map(into_buffer, matrices)), turns)
    stored = sum(c.stored_bytes for c in coded)
    return _row("lossless", weights, stored, encode=encode, decode=decode, into=into)


def _decode(matrix: OpenedMatrix, dtype: torch.dtype) -> Tensor:
    whole = Window(0, matrix.header.rows, 0, matrix.header.cols)
    return decode_matrix(matrix, whole, dtype)


def _into(matrix: OpenedMatrix, buffer: Tensor) -> None:
    tiles = range(len(matrix.header.tiles))
    codec = matrix.codec
    assert isinstance(codec, Lossless)
    codec.decode_tiles(matrix.stored(), tiles, buffer.data_ptr(), dtype_name(buffer.dtype), 1)


def _zipnn(weights: Sequence[Tensor], turns: int) -> Row:
    coder = ZipNN(input_format="torch", threads=1)
    # It reorders the bits of its input in place.
    copies = [[weight.clone() for weight in weights] for _ in range(turns)]
    coded, encode = seconds(lambda: [coder.compress(w) for w in copies.pop()], turns)
    for stream, weight in zip(coded, weights, strict=True):
        assert torch.equal(coder.decompress(stream).view(torch.uint8), weight.view(torch.uint8))
    _, decode = seconds(lambda: [coder.decompress(stream).shape for stream in coded], turns)
    return _row("zipnn", weights, sum(map(len, coded)), encode=encode, decode=decode)


def _zstd(weights: Sequence[Tensor], turns: int) -> Row:
    dense = [weight.view(torch.uint8).numpy().tobytes() for weight in weights]
    compress, decompress = zstandard.ZstdCompressor(3), zstandard.ZstdDecompressor()
    coded, encode = seconds(lambda: [compress.compress(data) for data in dense], turns)
    _, decode = seconds(lambda: [len(decompress.decompress(stream)) for stream in coded], turns)
    return _row("zstd", weights, sum(map(len, coded)), encode=encode, decode=decode)


def _exponents(weight: Tensor) -> tuple[NDArray[np.int64], int]:
    """How often each exponent occurs, and the bits of sign and mantissa."""
    exponent, mantissa = FIELDS[weight.dtype]
    signed = torch.int32 if weight.dtype == torch.float32 else torch.int16
    values = weight.view(signed).numpy() >> mantissa & (2**exponent - 1)
    return np.bincount(values.reshape(-1)), 1 + mantissa


def _entropy(counts: NDArray[np.int64]) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def _huffman_bits(counts: NDArray[np.int64]) -> float:
    """Length of all symbols in Huffman's code: the sum of the weights of its inner nodes."""
    heap = [int(count) for count in counts if count]
    heapq.heapify(heap)
    bits = heap[0] if len(heap) == 1 else 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        bits += both
        heapq.heappush(heap, both)
    return float(bits)


if __name__ == "__main__":
    main()
