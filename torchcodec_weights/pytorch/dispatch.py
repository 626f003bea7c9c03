"""PyTorch's functions and operators, implemented for CodecTensor.

Functions (`torch.nn.functional.linear`) are intercepted as a whole, so that a weight is decoded and
used in one operator. ATen's operators are called by autograd, DTensor and C++.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from torchcodec_weights.matrix.dtypes import FLOAT_DTYPES
from torchcodec_weights.pytorch import operators
from torchcodec_weights.tensor import CodecTensor

aten = torch.ops.aten
F = torch.nn.functional
implements: Callable[..., Any] = CodecTensor.implements
implements_function: Callable[..., Any] = CodecTensor.implements_torch_function


# Multiplication


@implements_function(F.linear)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _linear(*args, **kwargs)


@implements(aten.linear.default)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _linear(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, CodecTensor) or isinstance(input, CodecTensor):
        raise NotImplementedError("CodecTensor is a weight of linear, not its input")
    if len(weight.logical_shape) != 2:
        raise ValueError(f"weight.shape={tuple(weight.shape)}: linear takes 2 dimensions")
    return _product(input, weight, bias, transposed=bool(weight.transposed))


def _product(x: Tensor, weight: CodecTensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    """x times the encoded matrix or its transpose; see `operators.linear`."""
    device = x.device.type
    x, bias = _as_weight(x, weight, bias, device)
    window = weight.resolved_window
    _, rows, _, cols = window
    inner = rows if transposed else cols
    if x.dim() == 0 or x.shape[-1] != inner:
        raise ValueError(f"input.shape={tuple(x.shape)}: the last dimension must be {inner}")
    operator = _linear_for(x, bias, device)
    return cast(Tensor, operator(x, *weight.coded, bias, window, transposed))


def _linear_for(x: Tensor, bias: Tensor | None, device: str) -> Callable[..., Any]:
    """`operators.linear`, or what takes less time where that is the same.

    PyTorch's dispatcher takes longer than a small layer's product, autograd in it the longest.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return operators.linear
    if torch.compiler.is_compiling():
        return operators.linear_inference
    if device in ("cpu", "cuda") and operators.is_unwatched(x, bias):
        return operators.linear_unwatched
    return operators.linear_inference


def _as_weight(
    x: Tensor, weight: CodecTensor, bias: Tensor | None, device: str
) -> tuple[Tensor, Tensor | None]:
    """Input and bias in the dtype to compute in; ValueError if they do not fit the weight.

    Args:
        device: type of x's device.
    """
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return x.to(dtype), None if bias is None else bias.to(dtype)
    # `weight.dtype` would go through `__torch_function__`, a microsecond each time.
    own = weight.logical_dtype
    if x.dtype != own:
        raise ValueError(f"input.dtype={x.dtype} with a weight of {own}: convert one with .to()")
    if bias is not None and bias.dtype != own:
        raise ValueError(f"bias.dtype={bias.dtype} with a weight of {own}: convert one with .to()")
    return x, bias


@implements_function([torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__])
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    a, b = args if func is not Tensor.__rmatmul__ else args[::-1]
    return _matmul(a, b)


@implements([aten.mm.default, aten.matmul.default])
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _matmul(*args)


@implements(aten.addmm.default)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    bias, x, weight = args
    if kwargs:
        raise NotImplementedError(f"addmm with a CodecTensor and {kwargs}: allowed: none of these")
    if bias.dim() == 1:
        return _matmul(x, weight, bias)
    return _matmul(x, weight) + bias


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(x, CodecTensor):
        if isinstance(weight, CodecTensor) or weight.dim() != 2 or x.dim() != 2:
            raise NotImplementedError(
                "CodecTensor is the right factor of a product, or the left "
                "one with a matrix on its right"
            )
        return _matmul(weight.t(), x.t()).t()
    assert isinstance(weight, CodecTensor)
    if weight.dim() == 3:
        return _bmm(x, weight)
    return _product(x, weight, bias, transposed=not weight.transposed)


@implements_function([torch.bmm, Tensor.bmm])
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _bmm(*args, **kwargs)


@implements(aten.bmm.default)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _bmm(*args)


def _bmm(input: Tensor, mat2: Tensor) -> Tensor:
    """(experts, tokens, a) times (experts, a, b), one expert's weight after the other."""
    if not isinstance(mat2, CodecTensor) or isinstance(input, CodecTensor):
        raise NotImplementedError("CodecTensor is the right factor of bmm")
    if input.dim() != 3 or mat2.dim() != 3 or len(input) != len(mat2):
        raise ValueError(
            f"bmm of shapes {tuple(input.shape)} and {tuple(mat2.shape)}: allowed: (experts, "
            "tokens, a) and (experts, a, b)"
        )
    return torch.stack([_matmul(x, _select(mat2, e)) for e, x in enumerate(input.unbind())])


@implements_function(F.embedding)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _embedding(*args, **kwargs)


@implements(aten.embedding.default)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    weight, indices, *_ = args  # what follows concerns the gradient of the weight
    return _embedding(indices, weight)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if not isinstance(weight, CodecTensor) or weight.dim() != 2 or weight.transposed:
        raise NotImplementedError("embedding takes a CodecTensor of 2 dimensions as its weight")
    if not isinstance(input, Tensor):
        raise TypeError(f"input={input!r}: allowed: a Tensor of indices")
    if max_norm is not None:
        raise ValueError(f"max_norm={max_norm}: would write into a CodecTensor; allowed: None")
    return cast(
        Tensor, operators.embedding(input, *weight.coded, weight.resolved_window, weight.dtype)
    )


@implements_function([F.conv1d, F.conv2d, F.conv3d])
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _convolution(*args, **kwargs)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    _check_kernel(input, weight)
    assert isinstance(weight, CodecTensor)
    input, bias = _as_weight(input, weight, bias, input.device.type)
    dims = weight.dim() - 2
    steps, dilations = _each(stride, dims), _each(dilation, dims)
    single = input.dim() == weight.dim() - 1
    x = input.unsqueeze(0) if single else input
    if padding == "valid":
        sides = [0] * dims
    elif padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        # The larger half goes to the end, as PyTorch has it.
        x = F.pad(x, [side for span in reversed(spans) for side in (span // 2, span - span // 2)])
        sides = [0] * dims
    else:
        sides = _each(padding, dims)
    zeros = [0] * dims
    out = operators.convolution(
        x, *weight.coded, bias, weight.resolved_window, weight.logical_shape, steps, sides,
        dilations, False, zeros, groups,
    )  # fmt: skip
    return cast(Tensor, out.squeeze(0) if single else out)


@implements(aten.convolution.default)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, weight, bias, *geometry = args
    _check_kernel(x, weight)
    shape = weight.logical_shape
    return cast(
        Tensor,
        operators.convolution(x, *weight.coded, bias, weight.resolved_window, shape, *geometry),
    )


def _check_kernel(x: Tensor, weight: Tensor) -> None:
    if not isinstance(weight, CodecTensor) or isinstance(x, CodecTensor):
        raise NotImplementedError("CodecTensor is a weight of a convolution, not its input")
    if weight.transposed:
        raise NotImplementedError("a transposed CodecTensor is no weight of a convolution")


def _each(value: Any, dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value)


# Views. A view shares the bitstream and has another window.


@implements(aten.slice.Tensor)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CodecTensor:
    sliced = _slice(*args, **kwargs)
    return cast(CodecTensor, return_and_correct_aliasing(func, args, kwargs, sliced))


def _slice(
    self: CodecTensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> CodecTensor:
    dim %= self.dim()
    size = self.logical_shape[dim]
    first, stop, _ = slice(start, end).indices(size)
    if step != 1:
        raise NotImplementedError(f"slice of a CodecTensor with step={step}: allowed: 1")
    shape = list(self.logical_shape)
    shape[dim] = stop - first
    empty = first >= stop
    if not self.qdata.numel() and not empty:
        view = self.with_shape(shape, self.resolved_window)
        view.empty_base = self
        return view
    if (first, stop) == (0, size):
        return self.with_shape(shape, self.resolved_window)
    if empty and self.qdata.numel():
        raise NotImplementedError(
            f"slice {first}:{stop} of a CodecTensor is empty; allowed: at least one row or column"
        )
    axis = matrix_axis(self, dim)
    if axis is None:
        raise NotImplementedError(
            f"slice of dimension {dim} of a CodecTensor of shape {tuple(self.shape)}; allowed: "
            "dimension 0, and the one along the columns of its matrix; take the dense weight with "
            ".dequantize()"
        )
    return self.with_shape(shape, _part(self, axis, size, first, stop))


def matrix_axis(self: CodecTensor, dim: int) -> int | None:
    """Whether a dimension goes along the rows (0) or the columns (1) of the encoded matrix.

    None if it does neither: inner dimensions of weights of three dimensions or more.
    """
    if dim == self.dim() - (2 if self.transposed else 1):
        if self.resolved_window[3] == self.logical_shape[dim]:
            return 1
    elif dim == (1 if self.transposed and self.dim() == 2 else 0):
        return 0
    return None


@implements(aten.select.int)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CodecTensor:
    self, dim, index = args
    if dim % self.dim():
        raise NotImplementedError(
            f"select in dimension {dim} of a CodecTensor; allowed: 0; take the dense weight with "
            ".dequantize()"
        )
    return cast(CodecTensor, return_and_correct_aliasing(func, args, kwargs, _select(self, index)))


def _select(self: CodecTensor, index: int) -> CodecTensor:
    size = self.logical_shape[0]
    if self.dim() < 3 or not -size <= index < size:
        raise IndexError(
            f"index {index} into a CodecTensor of shape {tuple(self.shape)}: allowed: one expert "
            "of a weight of 3 dimensions or more"
        )
    index %= size
    return self.with_shape(self.logical_shape[1:], _part(self, 0, size, index, index + 1))


def _part(self: CodecTensor, axis: int, size: int, first: int, stop: int) -> list[int]:
    """The window that holds some indices of a dimension of `size` along rows (0) or columns (1)."""
    window = list(self.resolved_window)
    each = window[2 * axis + 1] // size
    window[2 * axis] += first * each
    window[2 * axis + 1] = (stop - first) * each
    return window


@implements([aten.split.Tensor, aten.split_with_sizes.default])
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[CodecTensor]:
    self, sizes, *rest = args
    dim = rest[0] if rest else kwargs.get("dim", 0)
    if isinstance(sizes, int):
        total = self.shape[dim]
        sizes = [min(sizes, total - i) for i in range(0, total, sizes)]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [_slice(self, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


@implements(aten.unbind.int)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[CodecTensor]:
    self, *rest = args
    if rest and rest[0] % self.dim():
        raise NotImplementedError(f"unbind of dimension {rest[0]} of a CodecTensor; allowed: 0")
    return [_select(self, index) for index in range(len(self))]


@implements([aten.t.default, aten.transpose.int, aten.permute.default])
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CodecTensor:
    self, *dims = args
    if func is aten.permute.default:  # .T calls it
        dims = [new for old, new in enumerate(dims[0]) if new % self.dim() != old]
    if dims and {d % self.dim() for d in dims} != {self.dim() - 2, self.dim() - 1}:
        raise NotImplementedError(
            f"transpose of dimensions {dims} of a CodecTensor; allowed: the last two"
        )
    _, _, _, cols = self.resolved_window
    *outer, a, b = self.logical_shape
    if cols != (a if self.transposed else b):
        raise NotImplementedError("transpose of a convolution's kernel: take .dequantize()")
    swapped = self.with_shape([*outer, b, a], self.resolved_window, not self.transposed)
    return cast(CodecTensor, return_and_correct_aliasing(func, args, kwargs, swapped))


@implements([aten.view.default, aten._unsafe_view.default])
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CodecTensor:
    self, wanted = args
    known = -math.prod(wanted)
    shape = [self.numel() // known if size == -1 else size for size in wanted]
    flat = shape == [self.numel()]  # FSDP2 holds its shards so
    if shape != list(self.shape) and not flat:
        raise NotImplementedError(
            f"view of a CodecTensor of shape {tuple(self.shape)} as {tuple(wanted)}; take the "
            "dense weight with .dequantize()"
        )
    same = self.with_shape(shape, self.resolved_window)
    return cast(CodecTensor, return_and_correct_aliasing(func, args, kwargs, same))


# Copies and moves


@implements([aten.detach.default, aten.alias.default])
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CodecTensor:
    alias = args[0].with_data(func)
    return cast(CodecTensor, return_and_correct_aliasing(func, args, kwargs, alias))


@implements_function(Tensor.contiguous)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CodecTensor:
    return cast(CodecTensor, args[0].compact())


@implements(aten.clone.default)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CodecTensor:
    compact = args[0].compact()
    copy = compact.with_data(torch.clone)
    return cast(CodecTensor, return_and_correct_aliasing(func, args, kwargs, copy))


@implements([aten.empty_like.default, aten.zeros_like.default])
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CodecTensor:
    """A buffer of the same sizes, for `copy_`. Until then it holds zeros, which are no bitstream:
    reading it raises CodecError.
    """
    device = kwargs.get("device")
    return cast(CodecTensor, args[0].with_data(lambda t: torch.zeros_like(t, device=device)))


@implements(aten._to_copy.default)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CodecTensor:
    self = args[0]
    to = self._get_to_kwargs(*args[1:], **kwargs)
    if to["dtype"] not in FLOAT_DTYPES:
        raise ValueError(f"dtype={to['dtype']}: a CodecTensor can be {FLOAT_DTYPES}")
    moved = self.with_data(lambda t: t.to(to["device"], non_blocking=to["non_blocking"]))
    moved = CodecTensor(
        moved.qdata,
        moved.scale,
        moved.act_pre_scale,
        self.logical_shape,
        to["dtype"],
        moved.zero_point,
        self.window,
        self.transposed,
    ).mark_checked()
    return cast(CodecTensor, return_and_correct_aliasing(func, args, kwargs, moved))


@implements(aten.copy_.default)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    self, source = args[0], args[1]
    if not isinstance(self, CodecTensor):
        dtype = self.dtype if self.dtype in FLOAT_DTYPES else None
        return cast(Tensor, self.copy_(source.dequantize(dtype)))
    if not isinstance(source, CodecTensor):
        raise ValueError(
            "copy_ of a dense tensor into a CodecTensor: load with assign=True and encode again "
            "with quantize_, or go back to dense weights first with decompress_(model)"
        )
    if not self.qdata.numel():
        source = source.compact()
        for empty in [self] if self.empty_base is None else [self, self.empty_base]:
            empty.qdata, empty.scale = source.qdata, source.scale
            empty.act_pre_scale, empty.zero_point = source.act_pre_scale, source.zero_point
            empty.window, empty.logical_shape = source.resolved_window, source.logical_shape
        return self
    mine, theirs = _inner_lengths(self), _inner_lengths(source)
    if mine != theirs or self.shape != source.shape:
        raise ValueError(
            f"copy_ from a CodecTensor of other sizes, {theirs}, into {mine}: bitstreams cannot "
            "be resized in place; load with assign=True"
        )
    if (self.resolved_window, bool(self.transposed)) != (
        source.resolved_window,
        bool(source.transposed),
    ):
        raise ValueError(
            f"copy_ from rows and columns {source.resolved_window} of a weight into "
            f"{self.resolved_window}: load with assign=True"
        )
    for target, inner in zip(self.coded, source.coded, strict=True):
        if target is not None and inner is not None:
            target.copy_(inner)
            if not target.is_inference():
                # Below autograd, writes are not counted, and the weight's header is known already.
                torch.autograd.graph.increment_version(target)
    return self


def _inner_lengths(weight: CodecTensor) -> dict[str, int]:
    """Elements of each inner tensor that is there."""
    names = ("qdata", "scale", "zero_point", "act_pre_scale")
    inner = zip(names, weight.coded, strict=True)
    return {name: tensor.numel() for name, tensor in inner if tensor is not None}


@implements(aten.equal.default)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    a, b = args
    if a.shape != b.shape:
        return False
    if all(isinstance(t, CodecTensor) for t in args) and a.resolved_window == b.resolved_window:
        inner = zip(a.coded, b.coded, strict=True)
        if all(s is t or (s is not None and t is not None and torch.equal(s, t)) for s, t in inner):
            return bool(a.transposed) == bool(b.transposed)
    return torch.equal(*(t.dequantize() if isinstance(t, CodecTensor) else t for t in args))


@implements_function(Tensor.requires_grad_)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CodecTensor:
    """Does nothing: loading into a model on the meta device would set requires_grad."""
    return cast(CodecTensor, args[0])


@implements_function([Tensor.numpy])
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise NotImplementedError(
        "a CodecTensor is no array; take .dequantize().numpy(). For accelerate's disk offload, "
        "save the state dict and use cpu_offload(model, state_dict=torch.load(file, mmap=True)): "
        "the bitstreams stay on disk until they are used"
    )


@implements_function([Tensor.storage])
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # No NotImplementedError, which safetensors would take for one of a tensor without data.
    raise ValueError(
        "a CodecTensor has no storage of its own. To save a model that quantize_ encoded, take "
        "torchcodec_weights.save_file(model.state_dict(), file) or torch.save; transformers' "
        "save_pretrained saves what from_pretrained encoded, with quantization_config="
        "TorchAoConfig(codec_weight_only(...))"
    )


@implements_function([Tensor.is_pinned])
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return cast(bool, args[0].qdata.is_pinned())


@implements_function([Tensor.pin_memory])
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CodecTensor:
    return cast(CodecTensor, args[0].with_data(Tensor.pin_memory))


@implements_function([Tensor.share_memory_])
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CodecTensor:
    self = args[0]
    for tensor in self.coded:
        if tensor is not None:
            tensor.share_memory_()
    return cast(CodecTensor, self)


@implements_function([Tensor.is_shared])
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return cast(bool, args[0].qdata.is_shared())
