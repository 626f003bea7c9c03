"""`torch.cat` and `torch.stack`: slices of a weight become one again, without decoding.

Different weights cannot become one: a container has one set of scales of columns and of the codec's
tables, and each weight has its own. A dense result would take the memory that the user saves, so
it is refused, with what to do instead.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchcodec_weights import third_party
from torchcodec_weights.format.container import of_one_matrix, select_tiles
from torchcodec_weights.matrix.opened import as_array, open_matrix
from torchcodec_weights.pytorch.dispatch import implements, matrix_axis
from torchcodec_weights.tensor import CodecTensor

aten = torch.ops.aten


@implements(aten.cat.default)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CodecTensor:
    return _cat(*args, **kwargs)


@implements(aten.stack.default)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CodecTensor:
    return _stack(*args, **kwargs)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> CodecTensor:
    parts = _weights("cat", tensors)
    first = parts[0]
    dim %= first.dim()
    axis = matrix_axis(first, dim)
    if axis is None:
        raise NotImplementedError(
            f"cat of CodecTensors of shape {tuple(first.shape)} in dimension {dim}; allowed: "
            "dimension 0, and the one along the columns of their matrix; take the dense weights "
            "with .dequantize()"
        )
    shape = list(first.logical_shape)
    shape[dim] = sum(part.logical_shape[dim] for part in parts)
    same = {(*part.logical_shape[:dim], *part.logical_shape[dim + 1 :]) for part in parts}
    if len(same) > 1:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(
            f"cat of CodecTensors of shapes {shapes} in dimension {dim}: allowed: shapes that "
            "differ in that dimension alone"
        )
    return _joined("cat", parts, shape, axis)


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> CodecTensor:
    parts = _weights("stack", tensors)
    first = parts[0]
    if dim % (first.dim() + 1):
        raise NotImplementedError(
            f"stack of CodecTensors in dimension {dim}; allowed: 0; take the dense weights with "
            ".dequantize()"
        )
    if any(part.shape != first.shape for part in parts):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(f"stack of CodecTensors of shapes {shapes}: allowed: one shape")
    return _joined("stack", parts, [len(parts), *first.logical_shape], 0)


def _weights(what: str, tensors: Sequence[Tensor]) -> list[CodecTensor]:
    """The tensors, if all are encoded and of one dtype."""
    parts = [tensor for tensor in tensors if isinstance(tensor, CodecTensor)]
    kinds = {(part.dtype, bool(part.transposed)) for part in parts}
    if len(parts) < len(tensors) or len(kinds) > 1:
        raise ValueError(
            f"{what} of encoded and dense tensors, or of several dtypes, or of some that are "
            "transposed: allowed: slices of one CodecTensor; take the dense weights with "
            ".dequantize(). For DistributedDataParallel, which joins all parameters, list the "
            "names of encoded ones in model._ddp_params_and_buffers_to_ignore"
        )
    return parts


def _joined(what: str, parts: list[CodecTensor], shape: list[int], axis: int) -> CodecTensor:
    """The weight that consists of parts, one after the other along rows (0) or columns (1).

    It shares the bitstream if the parts share one. Otherwise tiles are copied to a new one.
    """
    windows = [list(part.resolved_window) for part in parts]
    first, whole = parts[0], list(windows[0])
    start, size = 2 * axis, 2 * axis + 1
    adjacent = True
    for window in windows[1:]:
        next_one = list(whole)
        next_one[start], next_one[size] = whole[start] + whole[size], window[size]
        adjacent = adjacent and window == next_one
        whole[size] += window[size]
    if adjacent and all(_share(first, part) for part in parts):
        return first.with_shape(shape, whole)
    if not adjacent or not _have_data(parts):
        raise NotImplementedError(_refused(what))
    matrices = [open_matrix(*part.coded) for part in parts]
    headers = [matrix.header for matrix in matrices]
    if not all(of_one_matrix(headers[0], header) for header in headers):
        raise NotImplementedError(_refused(what))
    held = [
        matrix.tiles(window[0], window[0] + window[1])
        for matrix, window in zip(matrices, windows, strict=True)
    ]
    data = [as_array(part.qdata).data for part in parts]
    tiles = select_tiles(data, headers, range(held[0].start, held[-1].stop))
    joined = first.with_shape(shape, whole)
    joined.qdata = torch.from_numpy(tiles).to(first.qdata.device)
    return joined


def _share(first: CodecTensor, second: CodecTensor) -> bool:
    """Whether two weights are views of one bitstream."""
    pairs = list(zip(first.coded, second.coded, strict=True))
    if all(a is b for a, b in pairs):
        return True
    if not _have_data([first, second]):
        return False
    return all(
        a is b or (a is not None and b is not None and _place(a) == _place(b)) for a, b in pairs
    )


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _have_data(parts: Sequence[CodecTensor]) -> bool:
    return not any(part.qdata.is_meta or third_party.is_tracer(part.qdata) for part in parts)


def _refused(what: str) -> str:
    return (
        f"{what} of CodecTensors that are not slices of one weight, next to each other and in "
        "order: each weight has scales and tables of its own, which a joined one cannot have. "
        f"Encode the joined weight: CodecTensor.from_hp(torch.{what}([w.dequantize() for w in "
        "weights]), config)"
    )
