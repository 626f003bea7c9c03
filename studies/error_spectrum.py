"""How far the coding error of a real matrix is from white noise of its energy, by codec.

    python studies/error_spectrum.py ectcq/fast vvc/faster h264 --bits 2

All of it is in the normalized domain, where white noise has the same variance everywhere: spread of
the error's variance over blocks of 16 × 16 weights and over frequencies of their DCT (standard
deviation in dB), correlation of neighbours, excess kurtosis, correlation of the error with the
weight (of an MMSE quantizer: minus the root of the relative error), and the error's largest
singular value over that of white noise. What chance alone makes of each is in the row `white`.
Each codec is tried with the random signs of rows and columns and without.
"""

import argparse
from itertools import product

import numpy as np
import torch
from normalization import normalizer
from numpy.typing import NDArray

from torchcodec_weights import codec_weight_only
from torchcodec_weights.evaluation.models import load_smollm2
from torchcodec_weights.evaluation.recoding import recode
from torchcodec_weights.evaluation.snr import snr_db
from torchcodec_weights.matrix.normalize import SIGN_SEED

_BLOCK = 16
Array = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("codecs", nargs="*", default=["ectcq/fast", "vvc/faster"])
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--layer", default="model.layers.10.mlp.up_proj")
    args = parser.parse_args()
    weight = load_smollm2()[0].get_submodule(args.layer).weight.detach()
    print(
        f"{'codec':22} {'SNR dB':>7} {'blocks':>7} {'DCT dB':>7} {'right':>6} {'below':>6} "
        f"{'kurtosis':>8} {'with z':>7} {'largest':>8}"
    )
    white = np.random.default_rng(0).standard_normal(weight.shape)
    show("white", white, white)
    for name, variant in product(args.codecs, ("r1c1", "nosigns")):
        codec, _, preset = name.partition("/")
        config = codec_weight_only(codec, bits=args.bits, preset=preset or None)
        normalized = normalizer(variant)
        z = normalized(weight.numpy(), 5.0, SIGN_SEED).z
        _, coded = recode({"w": weight}, {"w": config}, normalizer=normalized)
        decoded = coded["w"].numpy()
        # Outliers, which z has as zeros, are exact: they have no error.
        scales = np.divide(weight.numpy(), z, where=z != 0, out=np.ones_like(z))
        error = np.where(z != 0, (decoded - weight.numpy()) / scales, 0.0)
        label = name if variant == "r1c1" else f"{name}, no signs"
        show(label, error.astype(np.float64), z.astype(np.float64))


def show(name: str, error: Array, z: Array) -> None:
    rows, cols = (side // _BLOCK * _BLOCK for side in error.shape)
    blocks = error[:rows, :cols].reshape(rows // _BLOCK, _BLOCK, cols // _BLOCK, _BLOCK)
    local = np.square(blocks).mean(axis=(1, 3))
    transform = _dct(_BLOCK)
    frequencies = np.einsum("fi,aibj,gj->abfg", transform, blocks, transform)
    spectrum = np.square(frequencies).mean(axis=(0, 1))
    largest = float(torch.linalg.matrix_norm(torch.from_numpy(error), 2))
    expected = error.std() * sum(side**0.5 for side in error.shape)
    print(
        f"{name:22} {snr_db([(z, z + error)]):7.2f} "
        f"{(10 * np.log10(local)).std():7.2f} {(10 * np.log10(spectrum)).std():7.2f} "
        f"{_correlation(error[:, 1:], error[:, :-1]):6.3f} "
        f"{_correlation(error[1:], error[:-1]):6.3f} "
        f"{np.mean(error**4) / np.mean(error**2) ** 2 - 3:8.2f} {_correlation(error, z):7.3f} "
        f"{largest / expected:8.3f}",
        flush=True,
    )


def _correlation(a: Array, b: Array) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def _dct(size: int) -> Array:
    """The orthonormal DCT-II as a matrix (frequency, position)."""
    k, n = np.ogrid[:size, :size]
    matrix = np.sqrt(2 / size) * np.cos(np.pi * (2 * n + 1) * k / (2 * size))
    matrix[0] /= np.sqrt(2)
    return np.asarray(matrix)


if __name__ == "__main__":
    main()
