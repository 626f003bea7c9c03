"""What products gain where tiles are divided into parts, as they are too few for all threads.

    python studies/divided_tiles.py

Nanoseconds per weight of a product with one token at 3 bits, tiles whole and divided by turns, the
least of the turns; on one thread and on two.
"""

import time
from unittest.mock import patch

import torch

from torchcodec_weights import CodecTensor, codec_weight_only
from torchcodec_weights.codecs.ectcq.linear import LinearProduct
from torchcodec_weights.format.dtypes import DTYPE_CODES
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.opened import open_matrix

SHAPES = (192, 576), (576, 576), (1536, 576), (2048, 2048)
TURNS = 15


def main() -> None:
    print(
        f"{'shape':>12}{'tiles':>7}{'parts':>7}{'threads':>9}{'whole':>8}{'divided':>9}{'ratio':>7}"
    )
    for rows, cols in SHAPES:
        weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
        coded = CodecTensor.from_hp(weight, codec_weight_only("ectcq", bits=3, preset="fast"))
        matrix = open_matrix(*coded.coded)
        tiles, window = matrix.tiles(0, rows), Window(0, rows, 0, cols)
        divided = LinearProduct(matrix.stored(), tiles, window)
        with patch.object(LinearProduct, "_divide"):
            whole = LinearProduct(matrix.stored(), tiles, window)
        for threads in (1, 2):
            least = [float("inf")] * 2
            for _ in range(TURNS):
                for number, product in enumerate((whole, divided)):
                    least[number] = min(least[number], _time(product, rows, cols, threads))
            a, b = least
            print(
                f"{f'{rows}x{cols}':>12}{len(tiles):7}{divided.parts:7}{threads:9}{a:8.3f}{b:9.3f}"
                f"{a / b:7.2f}"
            )


def _time(product: LinearProduct, rows: int, cols: int, threads: int) -> float:
    x, y = torch.ones(1, cols), torch.empty(1, rows)
    count = max(3, 2_000_000 // (rows * cols))
    start = time.perf_counter()
    for _ in range(count):
        product(x.data_ptr(), DTYPE_CODES["float32"], 1, None, y.data_ptr(), threads)
    return (time.perf_counter() - start) / count / (rows * cols) * 1e9


if __name__ == "__main__":
    main()
