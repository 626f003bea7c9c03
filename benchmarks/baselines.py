"""Other ways to store weights in few bits, each with what it would really store.

In groups of 64 weights along a row, or as many as asked, packed:

- `rtn`: rounds to the nearest level between the group's extremes; scale and zero point in bfloat16,
  half a bit per weight.
- `hqq`: the same, with scale and zero point fitted to an error with heavy tails (Badri and Shaji,
  "Half-Quadratic Quantization", 2023; torchao's implementation).
- `intx`: torchao's IntxWeightOnlyConfig, symmetric; a bfloat16 scale, a quarter bit per weight.
- `int4`: torchao's int4 for CPUs, whose kernel decodes it; scale and zero point in bfloat16.
- `nf4`: the 16 quantiles of QLoRA (Dettmers et al., arXiv 2305.14314), scaled by the group's
  largest magnitude in bfloat16; 4 bits only.

Others:

- `entropy`: after EntQuant (entropy-coded 8-bit integers): uniform levels of one step, in units of
  each row's root mean square, whose entropy is the rate; the coder is ideal, so bits are counted
  and nothing is packed.
- `nncodec`: Fraunhofer's ISO/IEC 15938-17 (DeepCABAC, trellis-coded quantization) on weights
  normalized as ours are; its bitstream and the scales are counted.
- `gguf/TYPE`: llama.cpp's own quantizer, with its importance matrix or without. Rows that are no
  multiple of its blocks take the type that llama.cpp falls back to. `gguf-flat/TYPE` takes a matrix
  as one row, `gguf-turned/TYPE` its transpose, whose blocks are not those in which weights may have
  been quantized before. IQ2_XXS and IQ2_XS are for an importance matrix only.
  It needs libggml-base.so of the package llama-cpp-python in the environment variable GGML_LIBRARY.
"""

import ctypes
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torchao.quantization
from numpy.typing import NDArray
from torch import Tensor
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

from torchcodec_weights.matrix.normalize import decode_scale, denormalize, normalize

GROUP = 64
BASELINES = (
    "rtn",
    "hqq",
    "intx",
    "int4",
    "nf4",
    "entropy",
    "nncodec",
    "gguf",
    "gguf-flat",
    "gguf-turned",
)

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


def quantize(
    weight: Tensor, method: str, bits: float, variant: str = "", importance: Tensor | None = None
) -> Baseline:
    """Quantize a weight (rows, cols) by one of the methods above.

    Args:
        weight: float32, cols a multiple of the group.
        method: one of `BASELINES`.
        bits: of a level where levels are packed, of everything with `entropy` and `nncodec`; the
            types of `gguf` have their own.
        variant: weights in a group, or the type of `gguf`.
        importance: float32 (cols,), the mean square of each input, as llama.cpp's imatrix has it;
            with `gguf` only.

    Raises:
        ValueError: the method does not have these bits or this type, takes no importance or needs
            one, or `importance` is not one value for each column.
    """
    if importance is not None:
        if not method.startswith("gguf"):
            raise ValueError(f"importance with {method}: allowed: with gguf methods, or None")
        if importance.dtype != torch.float32 or importance.shape != weight.shape[1:]:
            raise ValueError(
                f"importance is {importance.dtype} {tuple(importance.shape)}: allowed: "
                f"torch.float32 {tuple(weight.shape[1:])}"
            )
    if method == "gguf":
        return _gguf(weight, variant, importance)
    if method.startswith("gguf"):
        each = None if importance is None else importance.expand(weight.shape)
        if method == "gguf-flat":
            return _gguf_flat(weight, variant, each)
        turned = _gguf_flat(weight.T, variant, None if each is None else each.T)
        return replace(turned, weight=turned.weight.T.contiguous())
    if method in ("entropy", "nncodec"):
        return {"entropy": _entropy, "nncodec": _nncodec}[method](weight, bits)
    four = method in ("nf4", "int4")
    if bits != int(bits) or (four and bits != 4):
        raise ValueError(f"bits={bits:g} with {method}: allowed: {'4' if four else 'integers'}")
    groups: dict[str, Callable[[Tensor, int, int], Baseline]] = {
        "rtn": _rtn,
        "hqq": _hqq,
        "intx": _intx,
        "int4": _int4,
        "nf4": _nf4,
    }
    return groups[method](weight, int(bits), int(variant or GROUP))


def _rtn(weight: Tensor, bits: int, group: int) -> Baseline:
    groups = weight.reshape(-1, group)
    low = groups.amin(1)
    scale = ((groups.amax(1) - low) / (2**bits - 1)).clamp(min=1e-12).bfloat16()
    zero = (-low / scale.float()).bfloat16()
    levels = (groups / scale.float()[:, None] + zero.float()[:, None]).round()
    return _affine(weight, levels.clamp(0, 2**bits - 1), scale, zero, bits)


def _hqq(weight: Tensor, bits: int, group: int) -> Baseline:
    levels, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
        weight, bits, group, compute_dtype=torch.bfloat16, device="cpu", raw_output=True
    )
    return _affine(weight, levels.reshape(-1, group), scale.flatten(), zero.flatten(), bits)


def _affine(weight: Tensor, levels: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Baseline:
    decoded = (levels.float() - zero.float()[:, None]) * scale.float()[:, None]
    return _packed(decoded.reshape(weight.shape), levels, [scale, zero], bits)


def _layer(weight: Tensor, config: Any, dtype: torch.dtype) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
    layer.weight.data = weight.to(dtype, copy=True)
    torchao.quantization.quantize_(layer, config)
    return layer


def _intx(weight: Tensor, bits: int, group: int) -> Baseline:
    dtype = getattr(torch, f"int{bits}")
    config = IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerGroup(group))
    coded: Any = _layer(weight, config, torch.float32).weight
    levels = coded.qdata.reshape(-1, group) + 2 ** (bits - 1)
    scale = coded.scale.flatten().bfloat16()
    decoded = (levels.float() - 2 ** (bits - 1)) * scale.float()[:, None]
    return _packed(decoded.reshape(weight.shape), levels, [scale], bits)


def _int4(weight: Tensor, bits: int, group: int) -> Baseline:
    layer = _layer(weight, PrototypeInt4WeightOnlyConfig(group_size=group), torch.bfloat16)
    coded: Any = layer.weight
    stored = [coded.qdata, coded.scale_and_zero]
    decoded = layer(torch.eye(weight.shape[1], dtype=torch.bfloat16)).T.float().contiguous()
    return Baseline(decoded, stored, 8 * sum(part.nbytes for part in stored))


def _nf4(weight: Tensor, bits: int, group: int) -> Baseline:
    groups = weight.reshape(-1, group)
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
    low, high = -5.0, 3.0
    for _ in range(14):
        middle = (low + high) / 2
        levels = (weight / (rms * 2.0**middle)).round().clamp(-128, 127)
        counts = torch.bincount((levels.flatten() + 128).long()).double()
        counts = counts[counts > 0]
        rate = -(counts * (counts / weight.numel()).log2()).sum().item() + beside
        low, high = (middle, high) if rate > bits * weight.numel() else (low, middle)
    return Baseline(levels * rms * 2.0**middle, [], rate)


def _nncodec(weight: Tensor, bits: float) -> Baseline:
    norm = normalize(weight.numpy(), None)
    offset = 0.0 if norm.zero_point is None else norm.zero_point[:, None]
    beside = 8 * sum(weight.shape) + 64 + 32 * np.size(offset) * (norm.zero_point is not None)
    step, low, high = 2.0 ** (2.25 - bits), 0.0, math.inf
    for _ in range(12):
        stream, z = nncodec_tcq(norm.z, step)
        rate = (8 * len(stream) + beside) / weight.numel()
        if bits - 0.015 < rate <= bits:
            break
        low, high = (step, high) if rate > bits else (low, step)
        step *= 2.0 ** (rate - bits + 0.007)
        if not low < step < high:
            step = (low * high) ** 0.5
    denormalize(
        z, decode_scale(norm.scale, norm.row_base), decode_scale(norm.act_pre_scale, norm.col_base)
    )
    payload = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    scales = [torch.from_numpy(norm.scale), torch.from_numpy(norm.act_pre_scale)]
    return Baseline(torch.from_numpy(z + offset), [payload, *scales], rate * weight.numel())


def nncodec_tcq(z: NDArray[np.float32], step: float) -> tuple[bytes, NDArray[np.float32]]:
    """nncodec's bitstream for a matrix at a quantizer step, and what it decodes to."""
    from nncodec.extensions import deepCABAC

    # The coder's own steps are powers of two and between; the scale makes any step of one of them.
    density, qp, unary, no_hdsp = 2, -20, 10, np.zeros(2, np.int8)
    scale = np.float32(2.0 ** (qp / 2**density) / step)
    scaled = np.ascontiguousarray(z * scale)
    levels = np.zeros(z.shape, np.int32)
    encoder = deepCABAC.Encoder()
    encoder.initCtxModels(unary, 0)
    qp = encoder.quantLayer(scaled, levels, 1, density, qp, 0.0, unary, 0, 0)
    encoder = deepCABAC.Encoder()
    encoder.initCtxModels(unary + 1, 0)
    skip = np.zeros(z.shape[0], np.int32)
    encoder.encodeLayer(levels, 1, 0, 0, 0, 0, skip, deepCABAC.HdspMode.AlwaysOff, no_hdsp, 0, 0)
    stream = bytes(encoder.finish())
    decoded = np.zeros(z.shape, np.float32)
    deepCABAC.Decoder().dequantLayer(decoded, levels, density, qp, 0)
    return stream, decoded / scale


# Weights in a block, ggml's number of the type, what llama.cpp takes where rows do not fit
# (tensor_type_fallback in src/llama-quant.cpp).
_GGUF = {
    "Q4_0": (32, 2, ""),
    "Q4_1": (32, 3, ""),
    "Q5_0": (32, 6, ""),
    "Q5_1": (32, 7, ""),
    "Q8_0": (32, 8, ""),
    "IQ4_NL": (32, 20, ""),
    "Q2_K": (256, 10, "Q4_0"),
    "Q3_K": (256, 11, "Q4_0"),
    "Q4_K": (256, 12, "Q5_0"),
    "Q5_K": (256, 13, "Q5_1"),
    "Q6_K": (256, 14, "Q8_0"),
    "IQ2_XXS": (256, 16, "IQ4_NL"),
    "IQ2_XS": (256, 17, "IQ4_NL"),
    "IQ2_S": (256, 22, "IQ4_NL"),
    "IQ3_XXS": (256, 18, "IQ4_NL"),
    "IQ3_S": (256, 21, "IQ4_NL"),
    "IQ4_XS": (256, 23, "IQ4_NL"),
}
_NEEDS_IMPORTANCE = ("IQ2_XXS", "IQ2_XS")
"""ggml_quantize_requires_imatrix in ggml.c; ggml aborts the process without one."""


@cache
def _ggml() -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ["GGML_LIBRARY"])
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, *[size] * 3, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def _gguf_flat(weight: Tensor, kind: str, importance: Tensor | None) -> Baseline:
    each = None if importance is None else importance.reshape(-1)
    coded = _gguf(weight.reshape(1, -1), kind, each)
    return replace(coded, weight=coded.weight.reshape(weight.shape))


def _gguf(weight: Tensor, kind: str, importance: Tensor | None) -> Baseline:
    if kind not in _GGUF:
        raise ValueError(f"type {kind!r} of gguf: allowed: {', '.join(_GGUF)}")
    rows, cols = weight.shape
    if cols % _GGUF[kind][0]:
        kind = _GGUF[kind][2]
    if importance is None and kind in _NEEDS_IMPORTANCE:
        raise ValueError(f"{kind} without importance: allowed: with importance, or another type")
    number = _GGUF[kind][1]
    source, decoded = weight.contiguous(), torch.empty(rows, cols)
    each = None if importance is None else importance.contiguous()
    packed = torch.empty(2 * weight.numel(), dtype=torch.uint8)
    written = _ggml().ggml_quantize_chunk(
        number,
        source.data_ptr(),
        packed.data_ptr(),
        0,
        rows,
        cols,
        None if each is None else each.data_ptr(),
    )
    decode = getattr(_ggml(), "dequantize_row_" + kind.lower().replace("_k", "_K"))
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    decode.restype = None
    decode(packed.data_ptr(), decoded.data_ptr(), weight.numel())
    return Baseline(decoded, [packed[:written].clone()], 8.0 * written)
