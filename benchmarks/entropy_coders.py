"""ECTCQ beside other ways from weights to few bits: SNR at equal rate.

    pip install zstandard && pip install --no-deps nncodec==2.1.3 pybind11
    python benchmarks/entropy_coders.py --json benchmarks/results/entropy_coders.json
    python benchmarks/entropy_coders.py --peers --json benchmarks/results/peers.json

- `ectcq`: everything counted, as `codec_weight_only` stores it.
- `ecsq`: ideal entropy-coded scalar quantization of the normalized weight: uniform steps,
  centroids, the entropy of the levels as the rate; no side information counted.
- `nncodec`: Fraunhofer's implementation of ISO/IEC 15938-17 (DeepCABAC with trellis-coded
  quantization), on the normalized weight as well: its bitstream, without the scales.
- `zstd`: rows rounded to 8 bits, packed with zstd at level 19: what a file of int8 weights takes.

The matrices are Gaussian noise and a weight of all-MiniLM-L6-v2. `--peers`: the methods of
baselines.py on another of its weights, whose rows fit the blocks of all of them.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import zstandard
from baselines import nncodec_tcq, quantize
from common import gaussian, parser, write
from numpy.typing import NDArray
from tqdm.auto import tqdm

from torchcodec_weights import CodecTensor, codec_weight_only
from torchcodec_weights.evaluation.models import minilm_weights
from torchcodec_weights.evaluation.rows import Row
from torchcodec_weights.evaluation.snr import snr_db
from torchcodec_weights.matrix.normalize import normalize

Array = NDArray[np.float32]
PEERS: tuple[str, ...] = (
    "hqq:2",
    "rtn:2",
    "intx:2",
    "hqq:3",
    "rtn:3",
    "intx:3",
    "nf4:4",
    "hqq:4",
    "rtn:4",
    "int4:4",
)
PEERS += ("gguf/Q2_K", "gguf/IQ2_S", "gguf/IQ3_XXS", "gguf/Q3_K", "gguf/IQ3_S", "gguf/IQ4_XS")
PEERS += ("gguf/Q4_0", "gguf/IQ4_NL", "gguf/Q4_K", "gguf/Q5_K", "gguf/Q6_K")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--bits", type=float, nargs="*", default=[1, 2, 3, 4])
    options.add_argument(
        "--peers",
        nargs="*",
        metavar="METHOD",
        help="METHOD[/VARIANT]:BITS of fixed rate instead, on real weights; all by default",
    )
    args = options.parse_args()
    rows = _coders(args.bits) if args.peers is None else _peers(args.peers or PEERS)
    write(args.json, rows)


def _coders(rates: list[float]) -> list[Row]:
    weights = {
        "gaussian 1024 x 1024": gaussian(1024, 1024),
        "layer.3.intermediate": minilm_weights()["encoder.layer.3.intermediate.dense.weight"],
    }
    rows = []
    for name, weight in weights.items():
        z = normalize(weight.numpy(), None).z
        for bits in tqdm(rates, desc=name):
            coded = CodecTensor.from_hp(weight, codec_weight_only("ectcq", bits=bits))
            rows.append(_row(name, "ectcq", coded.bits_per_weight, coded.header.snr_db))
            # The others at the rate that ectcq came to.
            rate = coded.bits_per_weight
            rows.append(_row(name, "ecsq", *_at_rate(partial(_ecsq, z), rate)))
            rows.append(_row(name, "nncodec", *_at_rate(partial(_nncodec, z), rate)))
        rows.append(_row(name, "zstd", *_zstd(weight.numpy())))
    return rows


def _peers(methods: Sequence[str]) -> list[Row]:
    """Methods with rates of their own, each before `ectcq` at no more bits."""
    name = "layer.3.output"
    weight = minilm_weights()[f"encoder.{name}.dense.weight"]
    rows = []
    for method in tqdm(methods, desc=name):
        kind, _, bits = method.partition(":")
        kind, _, variant = kind.partition("/")
        coded = quantize(weight, kind, float(bits or 0), variant)
        rate = coded.bits / weight.numel()
        rows.append(_row(name, method, rate, snr_db([(weight, coded.weight)])))
        ours = CodecTensor.from_hp(weight, codec_weight_only("ectcq", bits=rate))
        snr = snr_db([(weight, ours.dequantize())])
        rows.append(_row(name, "ectcq", ours.bits_per_weight, snr))
    return rows


def _row(weight: str, method: str, bits: float, snr: float) -> Row:
    tqdm.write(f"{weight:22} {method:8} {bits:7.3f} bits  {snr:6.2f} dB")
    return {"weight": weight, "method": method, "bits": bits, "snr_db": snr}


def _at_rate(code: Callable[[float], tuple[float, float]], bits: float) -> tuple[float, float]:
    """Bisect the step until the rate is within 0.005 bits."""
    low, high = 2.0**-8, 2.0**3
    for _ in range(30):
        step = (low * high) ** 0.5
        rate, snr = code(step)
        if abs(rate - bits) < 0.005:
            break
        low, high = (step, high) if rate > bits else (low, step)
    return rate, snr


def _ecsq(z: Array, step: float) -> tuple[float, float]:
    levels = np.rint(z / step).astype(np.int64)
    levels -= levels.min()
    counts = np.bincount(levels.reshape(-1))
    centroids = np.bincount(levels.reshape(-1), z.reshape(-1)) / np.maximum(counts, 1)
    p = counts[counts > 0] / z.size
    return float(-(p * np.log2(p)).sum()), snr_db([(z, centroids[levels])])


def _nncodec(z: Array, step: float) -> tuple[float, float]:
    stream, decoded = nncodec_tcq(z, step)
    return 8 * len(stream) / z.size, snr_db([(z, decoded)])


def _zstd(w: Array) -> tuple[float, float]:
    scale = np.abs(w).max(axis=1, keepdims=True) / 127
    levels = np.rint(w / scale).astype(np.int8)
    size = len(zstandard.ZstdCompressor(level=19).compress(levels.tobytes())) + 2 * len(w)
    return 8 * size / w.size, snr_db([(w, levels * scale)])


if __name__ == "__main__":
    main()
