"""CodecTensor in PyTorch's distributed parts: scatter, broadcast, and FSDP2's all-gather.

Bitstreams differ in length from rank to rank, so lengths travel first, and what must be equally
long is padded. DTensor needs nothing else than the views of `dispatch`. Slices that are scattered
or sharded hold the tiles that they need, no more (`CodecTensor.compact`).
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
from torchcodec_weights.third_party import keeping_version

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

aten = torch.ops.aten
_PARTS = ("qdata", "scale", "act_pre_scale", "zero_point")


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
    sizes, geometry = _sizes(tensor), _geometry(tensor)
    given = scatter_list or []
    dist.scatter(sizes, [_sizes(part) for part in given] or None, **where)
    dist.scatter(geometry, [_geometry(part) for part in given] or None, **where)
    longest = sizes.clone()
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
    for name, size, room in zip(_PARTS, sizes.tolist(), longest.tolist(), strict=True):
        if room < 0:
            setattr(tensor, name, None)
            continue
        received = _empty(tensor, name, room)
        parts = [_padded(getattr(part, name), room) for part in given]
        dist.scatter(received, parts or None, **where)
        setattr(tensor, name, received[:size].clone())
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
    sizes = _sizes(tensor)
    dist.broadcast(sizes, **where)
    for name, size in zip(_PARTS, sizes.tolist(), strict=True):
        mine = getattr(tensor, name)
        if size < 0:
            setattr(tensor, name, None)
            continue
        if mine is None or mine.numel() != size:
            mine = _empty(tensor, name, size)
            setattr(tensor, name, mine)
        dist.broadcast(mine, **where)


def _sizes(tensor: CodecTensor) -> Tensor:
    """Elements of each part, −1 where there is none."""
    parts = [getattr(tensor, name) for name in _PARTS]
    sizes = [-1 if part is None else part.numel() for part in parts]
    return torch.tensor(sizes, device=tensor.device)


def _empty(tensor: CodecTensor, name: str, size: int) -> Tensor:
    """Memory for a part of a weight, on the weight's device."""
    dtype = torch.float32 if name == "zero_point" else torch.uint8
    return torch.empty(size, dtype=dtype, device=tensor.device)


def _geometry(tensor: CodecTensor) -> Tensor:
    """Window and shape."""
    return torch.tensor([*tensor.part, *tensor.logical_shape], device=tensor.device)


def _padded(part: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(part, (0, size - part.numel()))


# FSDP2 makes its shard by new_zeros, narrow and copy_, and keeps it as view(-1). Room for a shard
# has no bitstream yet; the copy brings it.


@implements(aten.new_zeros.default)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CodecTensor:
    self, size = args
    if len(size) != self.dim() or list(size[1:]) != self.logical_shape[1:]:
        raise NotImplementedError(
            f"new_zeros of a CodecTensor of shape {tuple(self.shape)} as {tuple(size)}; allowed: "
            "fewer rows of it"
        )
    room = self.with_shape(size, self.part)
    room.qdata = torch.zeros(0, dtype=torch.uint8, device=self.device)
    return room


@implements(aten.as_strided.default)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CodecTensor:
    self, size, stride, *offset = args
    if (list(size), list(stride)) != (list(self.shape), list(self.stride())) or any(offset):
        raise NotImplementedError(
            f"as_strided of a CodecTensor to another shape, {tuple(size)}; take .dequantize()"
        )
    return self.with_shape(self.logical_shape, self.part)


_LENGTH = 8  # bytes that hold the length of a rank's bitstream, ahead of it


def _pre_all_gather(
    self: CodecTensor,
    mesh: "DeviceMesh",
    outer_size: torch.Size,
    outer_stride: tuple[int, ...],
    module: nn.Module,
    mp_policy: "MixedPrecisionPolicy",
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """What FSDP2 gathers from each rank: the length of its bitstream, and the bitstream padded."""
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
    """The whole weight, from the slices of all ranks; still a bitstream."""
    (gathered,), (ranks,) = outputs, metadata
    slices = []
    for part in gathered.cpu().view(ranks, -1):
        length = int.from_bytes(bytes(part[:_LENGTH].tolist()), "little")
        if length:
            slices.append(part[_LENGTH : _LENGTH + length].clone())
    data = [as_array(s).data for s in slices]
    headers = [parse_header(d) for d in data]
    tiles = range(len(headers[0].tiles))
    whole = torch.from_numpy(select_tiles(data, headers, tiles)).to(self.device)
    if out is not None:
        local = getattr(out, "_local_tensor", out)  # of a DTensor
        assert isinstance(local, CodecTensor)
        if local.qdata.numel() != whole.numel():
            raise CodecError("the slices of a weight changed between two uses by FSDP")
        # The backward pass may hold this tensor, and these are the bytes that it had.
        with keeping_version(local.qdata):
            local.qdata.copy_(whole)
        return None
    header = headers[0]
    outer = list(self.logical_shape[1:])
    rows_each = self.part[1] // max(self.logical_shape[0], 1) or 1
    shape = [header.rows // rows_each, *outer]
    # FSDP frees this storage after use and allocates it anew, which one from NumPy does not allow.
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
