"""The operators that decode: `torch.ops.torchcodec_weights.dequantize` and `.linear`.

`linear` decodes and multiplies in one operator, with a gradient that decodes again: a weight
decoded outside of it would be kept for the backward pass, all layers at once, and be folded into
the graph by the compiler's constant folding.
"""

from typing import Any

import torch
from torch import Tensor

from torchcodec_weights.cache import CACHE
from torchcodec_weights.decoding import Matrix, decode_matrix, multiply_matrix, open_matrix


@torch.library.custom_op("torchcodec_weights::dequantize", mutates_args=())
def dequantize(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_pre_scale: Tensor,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    """Decode a weight.

    Args:
        qdata, scale, zero_point, act_pre_scale: as `CodecTensor` holds them.
        rows, cols: shape of the weight.
        dtype: dtype of the result.

    Returns:
        (rows, cols) on the device of `qdata`; a new tensor.

    Raises:
        CodecError: the bitstream is corrupt or does not fit.
    """
    matrix = _opened(qdata, scale, zero_point, act_pre_scale, rows, cols)
    weight = _decoded(matrix, qdata, dtype)
    return weight.clone() if CACHE.max_bytes else weight


@dequantize.register_fake
def _(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_pre_scale: Tensor,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    return qdata.new_empty((rows, cols), dtype=dtype)


@torch.library.custom_op("torchcodec_weights::linear", mutates_args=())
def linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_pre_scale: Tensor,
    bias: Tensor | None,
    rows: int,
    cols: int,
) -> Tensor:
    """x @ W.T + bias with W decoded to x's dtype.

    Args:
        x: (..., cols), floating point.
        qdata, scale, zero_point, act_pre_scale: as `CodecTensor` holds them.
        bias: (rows,) of x's dtype, or None.
        rows, cols: shape of the weight.

    Returns:
        (..., rows) of x's dtype.

    Raises:
        CodecError: the bitstream is corrupt or does not fit.
    """
    matrix = _opened(qdata, scale, zero_point, act_pre_scale, rows, cols)
    if matrix.codec.decodes_whole and x.device.type == "cpu" and not CACHE.max_bytes:
        product = multiply_matrix(matrix, x.reshape(-1, cols))
        if bias is not None:
            product += bias
        return product.reshape(*x.shape[:-1], rows)
    weight = _decoded(matrix, qdata, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


@linear.register_fake
def _(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_pre_scale: Tensor,
    bias: Tensor | None,
    rows: int,
    cols: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qdata, scale, zero_point, act_pre_scale, bias, rows, cols = inputs
    ctx.save_for_backward(qdata, scale, zero_point, act_pre_scale)
    ctx.has_bias, ctx.rows, ctx.cols = bias is not None, rows, cols


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = dequantize(*ctx.saved_tensors, ctx.rows, ctx.cols, grad.dtype)
        grad_x = grad @ weight
    if ctx.has_bias and ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, ctx.rows).sum(0)
    return grad_x, None, None, None, None, grad_bias, None, None


linear.register_autograd(_linear_backward, setup_context=_save_for_backward)


def _decoded(matrix: Matrix, qdata: Tensor, dtype: torch.dtype) -> Tensor:
    """The decoded weight, from the cache where it is allowed; not to be changed."""
    header = matrix.header

    def decode() -> Tensor:
        return decode_matrix(matrix, dtype).to(qdata.device)

    if not CACHE.max_bytes:
        return decode()
    key = (qdata.data_ptr(), header.total_size, header.crc, dtype, qdata.device)
    return CACHE.get(key, decode)


def _opened(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_pre_scale: Tensor,
    rows: int,
    cols: int,
) -> Matrix:
    matrix = open_matrix(qdata, scale, zero_point, act_pre_scale)
    header = matrix.header
    if (header.rows, header.cols) != (rows, cols):
        raise ValueError(
            f"shape ({rows}, {cols}) is not that of the bitstream, ({header.rows}, {header.cols})"
        )
    return matrix
