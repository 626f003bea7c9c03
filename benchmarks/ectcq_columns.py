"""ECTCQ's stream by columns beside the row-major one of the same matrix, in the same run.

    python benchmarks/ectcq_columns.py --json benchmarks/results/ectcq_columns.json

Gaussian weights at a step of 0.55 of their deviation, about 2 bits; the columns' deviations are
equal in the row-major stream, and fall from e^0.7 to e^−0.7 in that by columns, where columns are
in a random order. Rates are medians over turns, in which both streams are timed one after the
other; ratios are medians over the turns of the row-major stream's time over the other's.
"""

import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import google_crc32c
import numpy as np
import torch
from common import gaussian, machine, parser, seconds, write
from tqdm.auto import tqdm

from torchcodec_weights.codecs.ectcq import ECTCQ
from torchcodec_weights.codecs.ectcq.columns import ColumnModel
from torchcodec_weights.codecs.records import (
    EncodedTile,
    EncoderSettings,
    ErrorFeedback,
    FloatArray,
    StoredMatrix,
)
from torchcodec_weights.format.dtypes import DTYPE_CODES
from torchcodec_weights.format.tiling import Window

_STEP = 0.55
_TURNS = 21
_HEIGHT = 128  # rows of a tile of the stream by columns
_SHAPES = ((1536, 576), (4096, 4096))


def main() -> None:
    args = parser(__doc__).parse_args()
    write(args.json, {"machine": machine(), "decode": _decode(), "encode": _encode()})


def _cut(z: FloatArray, count: int) -> list[FloatArray]:
    bounds = [i * len(z) // count for i in range(count + 1)]
    return [z[a:b] for a, b in pairwise(bounds)]


def _stored(
    tiles: list[EncodedTile], private: bytes, shape: tuple[int, int], order: Any
) -> StoredMatrix:
    rows, cols = shape
    sizes = np.array([len(tile.payload) for tile in tiles], np.uint64)
    return StoredMatrix(
        data=memoryview(b"".join(tile.payload for tile in tiles)),
        offsets=np.cumsum(sizes) - sizes,
        payload_sizes=sizes.astype(np.uint32),
        outlier_sizes=np.zeros(len(tiles), np.uint32),
        crcs=np.array([google_crc32c.value(tile.payload) for tile in tiles], np.uint32),
        units=np.array([tile.unit for tile in tiles], np.float32),
        rows=rows,
        cols=cols,
        row_scale=np.ones(rows, np.float32),
        col_scale=np.ones(cols, np.float32),
        zero_point=None,
        dtype="float32",
        private=private,
        column_order=order,
    )


def streams(shape: tuple[int, int], step: float = _STEP) -> dict[str, StoredMatrix]:
    """The same matrix in both streams.

    Args:
        step: over the deviation of the row-major stream's weights.
    """
    rows, cols = shape
    codec, fast = ECTCQ(), EncoderSettings("fast")
    z = gaussian(rows, cols).numpy()
    tiles = _cut(z, max(1, round(z.size / codec.tile_weights)))
    private = codec.prepare(tiles, step, fast)
    peak = float(np.abs(z).max())
    coded = [codec.encode(tile, step, peak, private, fast) for tile in tiles]
    by_rows = _stored(coded, private, shape, None)
    varied = z * np.exp(np.linspace(0.7, -0.7, cols, dtype=np.float32))
    tiles = _cut(varied, max(1, rows // _HEIGHT))
    private = codec.prepare_columns(tiles, step, fast, None)
    coded = [codec.encode_columns(tile, step, private, fast, None) for tile in tiles]
    order = np.random.default_rng(0).permutation(cols).astype(np.uint32)
    return {"rows": by_rows, "columns": _stored(coded, private, shape, order)}


def _decode() -> list[dict[str, Any]]:
    print("million weights per second: by rows, by columns, ratio of the times")
    codec, results = ECTCQ(), []
    for shape in tqdm(_SHAPES):
        rows, cols = shape
        coded = streams(shape)
        x = np.random.default_rng(0).standard_normal((1, cols)).astype(np.float32)
        out, product = torch.empty(shape), np.empty((1, rows), np.float32)
        model = ColumnModel.from_bytes(coded["columns"].private, cols)
        bits = {name: 8 * len(stream.data) / out.numel() for name, stream in coded.items()}
        for what in ("float32", "bfloat16", "product"):
            for threads in (1, 2):
                calls: dict[str, Callable[[], Any]] = {}
                for name, stream in coded.items():
                    tiles = range(len(stream.offsets))
                    if what == "product":
                        calls[name] = partial(
                            codec.product(stream, tiles, Window(0, rows, 0, cols)),
                            x.ctypes.data,
                            DTYPE_CODES["float32"],
                            1,
                            None,
                            product.ctypes.data,
                            threads,
                        )
                    else:
                        calls[name] = partial(
                            codec.decode_tiles, stream, tiles, out.data_ptr(), what, threads
                        )
                times = _by_turns(calls)
                ratio = statistics.median(
                    a / b for a, b in zip(times["rows"], times["columns"], strict=True)
                )
                rates = {k: out.numel() / statistics.median(v) / 1e6 for k, v in times.items()}
                results.append(
                    {"shape": shape, "what": what, "threads": threads, "rates": rates,
                     "ratio": ratio, "classes": len(model.classes), "bits": bits}
                )  # fmt: skip
                tqdm.write(
                    f"{rows:5} x {cols:5}  {what:9} {threads} threads  {rates['rows']:8.1f} "
                    f"{rates['columns']:8.1f} {ratio:6.2f}"
                )
    return results


def _by_turns(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_TURNS):
        for name, call in calls.items():
            times[name] += seconds(call, 1)[1]
    return times


def _encode() -> list[dict[str, Any]]:
    print("one thread, 128 rows, preset best: nanoseconds per weight without feedback and with it")
    codec, best, results = ECTCQ(), EncoderSettings("best"), []
    for _, cols in _SHAPES:
        tile = gaussian(_HEIGHT, cols).numpy()
        rng = np.random.default_rng(0)
        factors = (0.01 * rng.standard_normal((cols, cols))).astype(np.float32)
        feedback = ErrorFeedback(factors, rng.permutation(cols).astype(np.uint32))
        private = codec.prepare_columns([tile], _STEP, best, None)
        calls = {
            name: partial(codec.encode_columns, tile, _STEP, private, best, given)
            for name, given in (("plain", None), ("feedback", feedback))
        }
        times = {
            name: [1e9 * t / tile.size for t in seconds(call, 5)[1]] for name, call in calls.items()
        }
        row = {name: statistics.median(taken) for name, taken in times.items()}
        results.append({"cols": cols, **row})
        print(f"  {cols:5} columns  {row['plain']:7.1f} {row['feedback']:7.1f}")
    return results


if __name__ == "__main__":
    main()
