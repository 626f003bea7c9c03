"""CodecTensor in torch.distributed: scatter, broadcast, and FSDP2's all-gather.

Bitstreams differ in length from rank to rank, so lengths are sent first, and tensors are padded to
the longest where a collective needs equal lengths. DTensor needs only the views of `dispatch`.
Slices that are scattered or sharded hold the tiles that they need, no more (`CodecTensor.compact`).

"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.container import parse_header, select_tiles
from torchcodec_weights.matrix.opened import as_array
from torchcodec_weights.pytorch.dispatch import implements, implements_function
from torchcodec_weights.tensor import CodecTensor
from torchcodec_weights.third_party import hash_local_tensors, keeping_version

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

aten = torch.ops.aten
hash_local_tensors()
_INNER = (*CodecTensor.tensor_data_names, *CodecTensor.optional_tensor_data_names)


@implements_function(dist.scatter)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _scatter(*args, **kwargs)


def _scatter(
    tensor: CodecTensor,
    scatter_list: list[CodecTensor] | None = None,
    src: int | None = None,
    group: Any = None,
    async_op: bool = False,
    group_src: int | None = None,
) -> None:
    if async_op:
        raise NotImplementedError("async_op=True: scatter of a CodecTensor is synchronous only")
    where = {"src": src, "group": group, "group_src": group_src}
    lengths, geometry = _inner_lengths(tensor), _geometry(tensor)
    shards = scatter_list or []
    dist.scatter(lengths, [_inner_lengths(shard) for shard in shards] or None, **where)
    dist.scatter(geometry, [_geometry(shard) for shard in shards] or None, **where)
    longest = lengths.clone()
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
    for name, length, capacity in zip(_INNER, lengths.tolist(), longest.tolist(), strict=True):
        if capacity < 0:
            setattr(tensor, name, None)
            continue
        received = _empty(tensor, name, capacity)
        padded = [_padded(getattr(shard, name), capacity) for shard in shards]
        dist.scatter(received, padded or None, **where)
        setattr(tensor, name, received[:length].clone())
    tensor.window, tensor.logical_shape = geometry[:4].tolist(), geometry[4:].tolist()


@implements_function(dist.broadcast)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _broadcast(*args, **kwargs)


def _broadcast(
    tensor: CodecTensor,
    src: int | None = None,
    group: Any = None,
    async_op: bool = False,
    group_src: int | None = None,
) -> None:
    if async_op:
        raise NotImplementedError("async_op=True: broadcast of a CodecTensor is synchronous only")
    where = {"src": src, "group": group, "group_src": group_src}
    lengths = _inner_lengths(tensor)
    dist.broadcast(lengths, **where)
    for name, length in zip(_INNER, lengths.tolist(), strict=True):
        mine = getattr(tensor, name)
        if length < 0:
            setattr(tensor, name, None)
            continue
        if mine is None or mine.numel() != length:
            mine = _empty(tensor, name, length)
            setattr(tensor, name, mine)
        dist.broadcast(mine, **where)


def _inner_lengths(tensor: CodecTensor) -> Tensor:
    """int64 (4,): elements of each inner tensor, −1 where there is none."""
    inner = [getattr(tensor, name) for name in _INNER]
    lengths = [-1 if data is None else data.numel() for data in inner]
    return torch.tensor(lengths, device=tensor.device)


def _empty(tensor: CodecTensor, name: str, length: int) -> Tensor:
    """Memory for an inner tensor of a weight, on the weight's device."""
    dtype = torch.float32 if name == "zero_point" else torch.uint8
    return torch.empty(length, dtype=dtype, device=tensor.device)


def _geometry(tensor: CodecTensor) -> Tensor:
    """int64: the window (4,), then the shape."""
    return torch.tensor([*tensor.resolved_window, *tensor.logical_shape], device=tensor.device)


def _padded(data: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(data, (0, length - data.numel()))


# FSDP2 makes its shard by new_zeros, narrow and copy_, and keeps it as view(-1). What new_zeros
# returns has an empty bitstream; `copy_` sets it.


@implements(aten.new_zeros.default)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CodecTensor:
    self, size = args
    if len(size) != self.dim() or list(size[1:]) != self.logical_shape[1:]:
        raise NotImplementedError(
            f"new_zeros of a CodecTensor of shape {tuple(self.shape)} as {tuple(size)}; allowed: "
            "fewer rows of it"
        )
    empty = self.with_shape(size, self.resolved_window)
    empty.qdata = torch.zeros(0, dtype=torch.uint8, device=self.device)
    return empty


@implements(aten.as_strided.default)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CodecTensor:
    self, size, stride, *offset = args
    if (list(size), list(stride)) != (list(self.shape), list(self.stride())) or any(offset):
        raise NotImplementedError(
            f"as_strided of a CodecTensor to another shape, {tuple(size)}; take .dequantize()"
        )
    return self.with_shape(self.logical_shape, self.resolved_window)


_LENGTH = 8  # bytes that hold the length of a rank's bitstream, ahead of it


def _pre_all_gather(
    self: CodecTensor,
    mesh: "DeviceMesh",
    outer_size: torch.Size,
    outer_stride: tuple[int, ...],
    module: nn.Module,
    mp_policy: "MixedPrecisionPolicy",
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Inputs of FSDP2's all-gather: the bitstream's length, then the bitstream, padded."""
    if not hasattr(self, "_longest"):
        longest = torch.tensor([self.qdata.numel()], device=self.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=mesh.get_group())
        self._longest = int(longest)
    length = torch.tensor([self.qdata.numel()]).view(torch.uint8).to(self.device)
    padded = _padded(self.qdata, self._longest)
    return (torch.cat([length, padded]),), (mesh.size(),)


def _post_all_gather(
    self: CodecTensor,
    outputs: tuple[Tensor, ...],
    metadata: tuple[int, ...],
    param_dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> tuple[CodecTensor, tuple[Tensor, ...]] | None:
    """The encoded weight joined from the slices of all ranks, not decoded."""
    (gathered,), (ranks,) = outputs, metadata
    slices = []
    for row in gathered.cpu().view(ranks, -1):
        length = int.from_bytes(bytes(row[:_LENGTH].tolist()), "little")
        if length:
            slices.append(row[_LENGTH : _LENGTH + length].clone())
    data = [as_array(s).data for s in slices]
    headers = [parse_header(d) for d in data]
    tiles = range(len(headers[0].tiles))
    whole = torch.from_numpy(select_tiles(data, headers, tiles)).to(self.device)
    if out is not None:
        local = getattr(out, "_local_tensor", out)  # of a DTensor
        assert isinstance(local, CodecTensor)
        if local.qdata.numel() != whole.numel():
            raise CodecError("the slices of a weight changed between two uses by FSDP")
        # The backward pass may have saved this tensor; it is filled with the same bytes again.
        with keeping_version(local.qdata):
            local.qdata.copy_(whole)
        return None
    header = headers[0]
    outer = list(self.logical_shape[1:])
    rows_each = self.resolved_window[1] // max(self.logical_shape[0], 1) or 1
    shape = [header.rows // rows_each, *outer]
    # FSDP frees and reallocates this storage, which is not possible for memory of NumPy.
    qdata = torch.empty_like(whole).copy_(whole)
    weight = CodecTensor(
        qdata,
        self.scale,
        self.act_pre_scale,
        shape,
        param_dtype,
        self.zero_point,
        [0, header.rows, 0, header.cols],
    ).mark_checked()
    return weight, (qdata,)


CodecTensor.fsdp_pre_all_gather = _pre_all_gather
CodecTensor.fsdp_post_all_gather = _post_all_gather
