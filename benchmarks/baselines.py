"""Other data-free ways to store weights in few bits, each with what it would really store.

In groups of 64 weights along a row, packed:

- `rtn`: rounds to the nearest level between the group's extremes; scale and zero point in bfloat16,
  half a bit per weight.
- `hqq`: the same, with scale and zero point fitted to an error with heavy tails (Badri and Shaji,
  "Half-Quadratic Quantization", 2023; torchao's implementation).
- `intx`: torchao's IntxWeightOnlyConfig, symmetric; a bfloat16 scale, a quarter bit per weight.
- `nf4`: the 16 quantiles of QLoRA (Dettmers et al., arXiv 2305.14314), scaled by the group's
  largest magnitude in bfloat16; 4 bits only.

- `entropy`: after EntQuant (entropy-coded 8-bit integers): uniform levels of one step, in units of
  each row's root mean square, whose entropy is the rate; the coder is ideal, so bits are counted
  and nothing is packed.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torchao.quantization
from torch import Tensor
from torchao.quantization import IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

GROUP = 64
BASELINES = ("rtn", "hqq", "intx", "nf4", "entropy")


_NF4 = torch.tensor(
    # arXiv 2305.14314, appendix E
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0]
)  # fmt: skip


@dataclass(frozen=True)
class Baseline:
    """A quantized weight.

    Attributes:
        weight: decoded, float32.
        stored: what a file would hold, where the method packs.
        bits: bits that are stored.
    """

    weight: Tensor
    stored: list[Tensor]
    bits: float


def quantize(weight: Tensor, method: str, bits: float) -> Baseline:
    """Quantize a weight (rows, cols), cols a multiple of 64, by one of the methods above.

    Raises:
        ValueError: the method does not have these bits.
    """
    if method == "entropy":
        return _entropy(weight, bits)
    if bits != int(bits) or (method == "nf4" and bits != 4):
        raise ValueError(
            f"bits={bits:g} with {method}: allowed: {'4' if method == 'nf4' else 'integers'}"
        )
    return {"rtn": _rtn, "hqq": _hqq, "intx": _intx, "nf4": _nf4}[method](weight, int(bits))


def _rtn(weight: Tensor, bits: int) -> Baseline:
    groups = weight.reshape(-1, GROUP)
    low = groups.amin(1)
    scale = ((groups.amax(1) - low) / (2**bits - 1)).clamp(min=1e-12).bfloat16()
    zero = (-low / scale.float()).bfloat16()
    levels = (groups / scale.float()[:, None] + zero.float()[:, None]).round()
    return _affine(weight, levels.clamp(0, 2**bits - 1), scale, zero, bits)


def _hqq(weight: Tensor, bits: int) -> Baseline:
    levels, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
        weight, bits, GROUP, compute_dtype=torch.bfloat16, device="cpu", raw_output=True
    )
    return _affine(weight, levels.reshape(-1, GROUP), scale.flatten(), zero.flatten(), bits)


def _affine(weight: Tensor, levels: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Baseline:
    decoded = (levels.float() - zero.float()[:, None]) * scale.float()[:, None]
    return _packed(decoded.reshape(weight.shape), levels, [scale, zero], bits)


def _intx(weight: Tensor, bits: int) -> Baseline:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    dtype = getattr(torch, f"int{bits}")
    torchao.quantization.quantize_(
        layer, IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerGroup(GROUP))
    )
    coded = layer.weight
    levels = coded.qdata.reshape(-1, GROUP) + 2 ** (bits - 1)
    scale = coded.scale.flatten().bfloat16()
    decoded = (levels.float() - 2 ** (bits - 1)) * scale.float()[:, None]
    return _packed(decoded.reshape(weight.shape), levels, [scale], bits)


def _nf4(weight: Tensor, bits: int) -> Baseline:
    groups = weight.reshape(-1, GROUP)
    scale = groups.abs().amax(1).clamp(min=1e-12).bfloat16()
    levels = torch.bucketize(groups / scale.float()[:, None], (_NF4[1:] + _NF4[:-1]) / 2)
    decoded = (_NF4[levels] * scale.float()[:, None]).reshape(weight.shape)
    return _packed(decoded, levels, [scale], bits)


def _packed(decoded: Tensor, levels: Tensor, beside: list[Tensor], bits: int) -> Baseline:
    planes = np.unpackbits(levels.to(torch.uint8).numpy()[..., None], axis=-1)[..., 8 - bits :]
    stored = [torch.from_numpy(np.packbits(planes)), *beside]
    return Baseline(decoded, stored, 8 * sum(part.nbytes for part in stored))


def _entropy(weight: Tensor, bits: float) -> Baseline:
    rms = weight.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12).bfloat16().float()
    beside = 16 * len(weight) + 8 * 256  # scales, and a byte for each symbol's frequency
    low, high = -6.0, 4.0
    for _ in range(24):
        middle = (low + high) / 2
        levels = (weight / (rms * 2.0**middle)).round().clamp(-128, 127)
        counts = torch.bincount((levels.flatten() + 128).long()).double()
        counts = counts[counts > 0]
        rate = -(counts * (counts / weight.numel()).log2()).sum().item() + beside
        low, high = (middle, high) if rate > bits * weight.numel() else (low, middle)
    return Baseline(levels * rms * 2.0**middle, [], rate)
