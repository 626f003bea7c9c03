"""Other data-free ways to store weights in few bits, packed as they would be stored.

Both cut rows into groups of 64 weights and keep a bfloat16 scale and zero point for each, half a
bit per weight: `rtn` rounds to the nearest level between the group's extremes, `hqq` (Badri and
Shaji, "Half-Quadratic Quantization", 2023; torchao's implementation) fits scale and zero point to
an error with heavy tails.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

GROUP = 64


@dataclass(frozen=True)
class Grouped:
    """A quantized weight: levels packed to bits, and scale and zero of each group."""

    packed: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes that are stored."""
        return self.packed.nbytes + self.scale.nbytes + self.zero.nbytes

    def dequantize(self) -> Tensor:
        """float32, of `shape`: (level − zero) · scale."""
        raw = np.unpackbits(self.packed.numpy(), count=int(np.prod(self.shape)) * self.bits)
        weights = 2 ** np.arange(self.bits)[::-1]
        levels = torch.from_numpy(raw.reshape(-1, GROUP, self.bits) @ weights).float()
        weight = (levels - self.zero.float()[:, None]) * self.scale.float()[:, None]
        return weight.reshape(self.shape)


def quantize(weight: Tensor, method: str, bits: int) -> Grouped:
    """Quantize a weight whose number of columns is a multiple of 64, by "rtn" or "hqq"."""
    groups = weight.reshape(-1, GROUP)
    if method == "hqq":
        levels, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
            weight, bits, GROUP, compute_dtype=torch.bfloat16, device="cpu", raw_output=True
        )
        levels, scale, zero = levels.reshape(-1, GROUP), scale.flatten(), zero.flatten()
    else:
        low = groups.amin(1)
        scale = ((groups.amax(1) - low) / (2**bits - 1)).clamp(min=1e-12).bfloat16()
        zero = (-low / scale.float()).bfloat16()
        levels = (groups / scale.float()[:, None] + zero.float()[:, None]).round()
        levels = levels.clamp(0, 2**bits - 1).to(torch.uint8)
    planes = np.unpackbits(levels.numpy()[..., None], axis=-1)[..., 8 - bits :]
    packed = torch.from_numpy(np.packbits(planes))
    return Grouped(packed, scale, zero, bits, (weight.shape[0], weight.shape[1]))
