"""The operators that decode: `dequantize`, `linear`, `convolution` and `embedding`.

`linear_inference` is `linear` without a gradient: autograd's part of an operator is a function of
Python that takes longer than a small layer's product, also where nothing needs a gradient. On the
CPU it is compiled code (codecs/common/operators.py), which hands over to `linear_python` what it
does not know: the first uses of a weight, other codecs, many tokens, weights that are kept dense.

They are in `torch.ops.torchcodec_weights`. Each decodes and uses a weight in one operator, and its
gradient decodes again. If decoding were an operator of its own, autograd would keep the decoded
weights of all layers for the backward pass, and the compiler would fold them into the graph.

All take a weight as the inner tensors of `CodecTensor` (qdata, scale, zero_point, act_pre_scale)
and a `window`, the rows and columns of the encoded matrix that the weight consists of, as four
integers: first row, rows, first column, columns. All raise CodecError if the bitstream is corrupt.
"""

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from torchcodec_weights import third_party
from torchcodec_weights.codecs.common import operators as compiled_operators
from torchcodec_weights.decoders import choice, resident
from torchcodec_weights.decoders.cache import CACHE
from torchcodec_weights.decoders.int8 import Int8Weight
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.opened import OpenedMatrix, open_matrix

_NAMESPACE = "torchcodec_weights"
_WEIGHT = "Tensor qdata, Tensor scale, Tensor? zero_point, Tensor act_pre_scale"
# Kernels take any strides and return contiguous tensors; nothing here needs a fixed layout.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)


def _define(name: str, schema: str) -> Any:
    torch.library.define(f"{_NAMESPACE}::{name}", schema, tags=_TAGS)
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


dequantize = _define("dequantize", f"({_WEIGHT}, int[] window, ScalarType dtype) -> Tensor")
_LINEAR = f"(Tensor x, {_WEIGHT}, Tensor? bias, int[] window, bool transposed) -> Tensor"
linear = _define("linear", _LINEAR)
linear_inference = _define("linear_inference", _LINEAR)
linear_python = _define("linear_python", _LINEAR)
keep_levels = _define(
    "keep_levels",
    f"({_WEIGHT}, int[] window, Tensor levels, int stride, Tensor row_scale, Tensor? col_scale, "
    "Tensor? shift, Tensor exact_starts, Tensor exact_columns, Tensor exact_values, int first_col) "
    "-> ()",
)
convolution = _define(
    "convolution",
    f"(Tensor x, {_WEIGHT}, Tensor? bias, int[] window, int[] shape, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups) "
    "-> Tensor",
)
embedding = _define(
    "embedding", f"(Tensor indices, {_WEIGHT}, int[] window, ScalarType dtype) -> Tensor"
)


@torch.library.impl(f"{_NAMESPACE}::dequantize", "CompositeExplicitAutograd")
def _dequantize(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_pre_scale: Tensor,
    window: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Decode to a new tensor (rows, cols) of `dtype` on the device of `qdata`."""
    matrix = open_matrix(qdata, scale, zero_point, act_pre_scale)
    window = Window(*window)
    weight = _decoded(matrix, window, qdata.device, dtype)
    return weight.clone() if CACHE.keeps(window, dtype) else weight


@torch.library.register_fake(f"{_NAMESPACE}::dequantize")
def _(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_pre_scale: Tensor,
    window: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    _, rows, _, cols = window
    return qdata.new_empty((rows, cols), dtype=dtype)


def linear_kernel(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_pre_scale: Tensor,
    bias: Tensor | None,
    window: Sequence[int],
    transposed: bool,
) -> Tensor:
    """x @ W.T + bias, or x @ W + bias if `transposed`, with W (rows, cols) decoded to x's dtype.

    Args:
        x: (..., cols), or (..., rows) if `transposed`; floating point.
        bias: (rows,), or (cols,) if `transposed`, of x's dtype, or None.

    Returns:
        (..., rows), or (..., cols) if `transposed`, of x's dtype.
    """
    matrix = open_matrix(qdata, scale, zero_point, act_pre_scale)
    return _multiply(matrix, Window(*window), x, bias, transposed)


def _multiply(
    matrix: OpenedMatrix, window: Window, x: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    if not transposed:
        flat = x if x.dim() == 2 else x.reshape(-1, window.cols)
        kept = resident.find(matrix, window, x.device) if resident.KEPT else None
        product = None if kept is None else kept.multiply(flat, bias)
        if product is None and not CACHE.keeps(window, x.dtype):
            product = choice.multiply(matrix, window, flat, bias)
        if product is not None:
            return product if flat is x else product.view(*x.shape[:-1], window.rows)
    weight = _in_use(matrix, window, x.device, x.dtype)
    return torch.nn.functional.linear(x, weight.t() if transposed else weight, bias)


def _linear_fake(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_pre_scale: Tensor,
    bias: Tensor | None,
    window: Sequence[int],
    transposed: bool,
) -> Tensor:
    _, rows, _, cols = window
    return x.new_empty((*x.shape[:-1], cols if transposed else rows))


def _linear_python(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_pre_scale: Tensor,
    bias: Tensor | None,
    window: Sequence[int],
    transposed: bool,
) -> Tensor:
    """`linear_kernel`; from a weight's second or third use on compiled code may do it."""
    matrix = open_matrix(qdata, scale, zero_point, act_pre_scale)
    part = Window(*window)
    product = _multiply(matrix, part, x, bias, transposed)
    if not transposed and x.is_cpu and not CACHE.max_bytes:
        _hand_over(matrix, part)
    return product


def _hand_over(matrix: OpenedMatrix, window: Window) -> None:
    """Have compiled code multiply by a weight on the CPU from now on, if it can."""
    coded = matrix.tensors
    address = coded[0].data_ptr()
    name = matrix.serial, window
    if name in compiled_operators.KNOWN.get(address, ()):
        return
    kept = resident.find(matrix, window, coded[0].device) if resident.KEPT else None
    if isinstance(kept, Int8Weight):
        if not compiled_operators.register():
            return
        keep_levels(*coded, window, *kept.parts)
    elif kept is not None or not matrix.has_cpu_alone:
        return
    elif matrix not in _used:
        # Some weights are opened for one use alone: those that Python has no object of.
        _used.add(matrix)
        return
    elif compiled_operators.know(*coded, window):
        matrix.forget_product(window)
    else:
        return
    compiled_operators.KNOWN.setdefault(address, set()).add(name)
    if matrix.serial not in _watched:
        _watched.add(matrix.serial)
        weakref.finalize(matrix, _forget, matrix.serial, address).atexit = False


_used: weakref.WeakSet[OpenedMatrix] = weakref.WeakSet()
# Serial numbers of matrices that compiled code forgets when they are freed.
_watched: set[int] = set()


def _forget(serial: int, qdata: int) -> None:
    _watched.discard(serial)
    compiled_operators.forget(qdata)


def linear_unwatched(x: Tensor, qdata: Tensor, *rest: Any) -> Tensor:
    """`linear_inference` where `is_unwatched`, in the least time; takes the same arguments."""
    if CACHE.max_bytes or qdata.data_ptr() not in compiled_operators.KNOWN:
        return _linear_python(x, qdata, *rest)
    return _by_compiled(_compiled_inference, x, qdata, *rest)


def is_unwatched(x: Tensor, bias: Tensor | None) -> bool:
    """Whether a product without a gradient may leave out PyTorch's dispatcher."""
    plain = _is_plain(x) and (bias is None or _is_plain(bias))
    return plain and not third_party.calls_are_watched()


_PLAIN = (Tensor, torch.nn.Parameter)


def _is_plain(x: Tensor) -> bool:
    """Whether a tensor's numbers lie in its memory: no subclass, view of negated ones, or zeros."""
    return type(x) in _PLAIN and not x.is_neg() and not third_party.is_zeros_without_memory(x)


def _call_inference(compiled: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`linear_inference` from Python, with the errors of Python."""
    if (resident.KEPT or CACHE.max_bytes) and len(args) == 8 and is_unwatched(args[0], args[5]):
        return linear_unwatched(*args)  # compiled code does not know of the cache
    return _by_compiled(compiled, *args, **kwargs)


def _by_compiled(compiled: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Compiled code has no CodecError to raise: Python does again what failed there."""
    try:
        return cast(Tensor, compiled(*args, **kwargs))
    except RuntimeError as error:
        if not str(error).startswith(f"{_NAMESPACE}: "):
            raise
    return linear_kernel(*args, **kwargs)


for _name, _kernel in (
    ("linear", linear_kernel),
    ("linear_inference", linear_kernel),
    ("linear_python", _linear_python),
):
    torch.library.impl(f"{_NAMESPACE}::{_name}", "CompositeExplicitAutograd")(_kernel)
    torch.library.register_fake(f"{_NAMESPACE}::{_name}")(_linear_fake)
_compiled_inference = linear_inference._op
if compiled_operators.register():
    third_party.route_calls(linear_inference, _call_inference)


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *weight, bias, window, transposed = inputs
    ctx.save_for_backward(*weight)
    ctx.has_bias, ctx.window, ctx.transposed = bias is not None, window, transposed


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = linear(grad, *ctx.saved_tensors, None, ctx.window, not ctx.transposed)
    if ctx.has_bias and ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, None, grad_bias, None, None


torch.library.register_autograd(
    f"{_NAMESPACE}::linear", _linear_backward, setup_context=_linear_context
)


def _linear_vmap(
    operator: Any,
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_pre_scale: Tensor,
    bias: Tensor | None,
    window: Sequence[int],
    transposed: bool,
) -> tuple[Tensor, int]:
    x_dim, *weight_dims, bias_dim, _, _ = in_dims
    if any(dim is not None for dim in weight_dims):
        raise NotImplementedError("torchcodec_weights::linear: vmap over weights; over x it works")
    x = x.movedim(x_dim, 0) if x_dim is not None else x.expand(info.batch_size, *x.shape)
    inner = None if bias_dim is not None else bias
    product = operator(x, qdata, scale, zero_point, act_pre_scale, inner, window, transposed)
    if bias is not None and bias_dim is not None:
        biases = bias.movedim(bias_dim, 0)
        product = product + biases.view(len(biases), *[1] * (product.dim() - 2), -1)
    return product, 0


for _operator in (linear, linear_inference):
    torch.library.register_vmap(_operator.name())(partial(_linear_vmap, _operator))


@torch.library.impl(f"{_NAMESPACE}::convolution", "CompositeExplicitAutograd")
def _convolution(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_pre_scale: Tensor,
    bias: Tensor | None,
    window: Sequence[int],
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """`aten.convolution` with the weight decoded to x's dtype and viewed as `shape`."""
    matrix = open_matrix(qdata, scale, zero_point, act_pre_scale)
    weight = _in_use(matrix, Window(*window), x.device, x.dtype).view(*shape)
    return torch.ops.aten.convolution(
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
    ).contiguous()


@torch.library.register_fake(f"{_NAMESPACE}::convolution")
def _(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_pre_scale: Tensor,
    bias: Tensor | None,
    window: Sequence[int],
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    out = torch.ops.aten.convolution(
        x, x.new_empty(shape), bias, stride, padding, dilation, transposed, output_padding, groups
    )
    return x.new_empty(out.shape)


def _convolution_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight, bias, window, shape, stride, padding, dilation, transposed, _, groups = inputs
    ctx.save_for_backward(*weight)
    ctx.has_bias, ctx.window, ctx.shape, ctx.input_size = bias is not None, window, shape, x.shape
    ctx.geometry = stride, padding, dilation, transposed, groups


def _convolution_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of a convolution is the transposed convolution with the same weight."""
    grad_x = grad_bias = None
    stride, padding, dilation, transposed, groups = ctx.geometry
    if ctx.needs_input_grad[0]:
        missing = [0] * len(stride)
        if not transposed:
            kernel = ctx.shape[2:]
            smallest = [
                (size - 1) * s - 2 * p + d * (k - 1) + 1
                for size, s, p, d, k in zip(
                    grad.shape[2:], stride, padding, dilation, kernel, strict=True
                )
            ]
            missing = [a - b for a, b in zip(ctx.input_size[2:], smallest, strict=True)]
        grad_x = convolution(
            grad,
            *ctx.saved_tensors,
            None,
            ctx.window,
            ctx.shape,
            stride,
            padding,
            dilation,
            not transposed,
            missing,
            groups,
        )
    if ctx.has_bias and ctx.needs_input_grad[5]:
        grad_bias = grad.sum([0, *range(2, grad.dim())])
    return grad_x, None, None, None, None, grad_bias, *[None] * 8


torch.library.register_autograd(
    f"{_NAMESPACE}::convolution", _convolution_backward, setup_context=_convolution_context
)


@torch.library.impl(f"{_NAMESPACE}::embedding", "CompositeExplicitAutograd")
def _embedding(
    indices: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_pre_scale: Tensor,
    window: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Rows of a weight; decodes only the tiles that hold them.

    Args:
        indices: int64 or int32 of any shape, 0 to rows − 1.

    Returns:
        (*indices.shape, cols) of `dtype`.

    Raises:
        IndexError: an index lies outside.
        RuntimeError: `indices` is of another dtype.
    """
    _check_indices(indices)
    matrix = open_matrix(qdata, scale, zero_point, act_pre_scale)
    window = Window(*window)
    kept = resident.find(matrix, window, indices.device) if resident.KEPT else None
    if kept is not None and (rows := kept.rows(indices, dtype)) is not None:
        return rows.view(*indices.shape, window.cols)
    weight = CACHE.look_up(matrix, window, dtype, indices.device)
    if weight is None:
        weight = choice.rows(matrix, window, indices, dtype)
        return weight.view(*indices.shape, window.cols)
    return torch.nn.functional.embedding(indices, weight)


@torch.library.register_fake(f"{_NAMESPACE}::embedding")
def _(
    indices: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_pre_scale: Tensor,
    window: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    _check_indices(indices)
    return indices.new_empty((*indices.shape, window[3]), dtype=dtype)


def _check_indices(indices: Tensor) -> None:
    """Raise PyTorch's own error for indices of another dtype."""
    if indices.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(
            "Expected tensor for argument #1 'indices' to have one of the following scalar types: "
            f"Long, Int; but got {indices.dtype} instead (while checking arguments for embedding)"
        )


def _in_use(
    matrix: OpenedMatrix, window: Window, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The weight to compute with: what is resident of it, or the decoded one."""
    kept = resident.find(matrix, window, device)
    weight = None if kept is None else kept.decoded(dtype)
    return _decoded(matrix, window, device, dtype) if weight is None else weight


def _decoded(
    matrix: OpenedMatrix, window: Window, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The decoded weight, from the cache if it fits the budget; it must not be changed."""
    if CACHE.keeps(window, dtype):
        return CACHE.get(matrix, window, dtype, device)
    return choice.decode(matrix, window, dtype, device)
