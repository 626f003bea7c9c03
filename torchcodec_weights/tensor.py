"""CodecTensor: a weight held as a bitstream, decoded when it is used."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import TorchAOBaseTensor

from torchcodec_weights import ops
from torchcodec_weights.container import Header, parse_header
from torchcodec_weights.encoding import encode_matrix
from torchcodec_weights.workers import encoder_pool

if TYPE_CHECKING:
    from torchcodec_weights.config import CodecWeightOnlyConfig

aten = torch.ops.aten
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class CodecTensor(TorchAOBaseTensor):
    """A 2-D weight (out_features, in_features) held as a bitstream.

    Behaves as the dense weight in `torch.nn.functional.linear`; everything else that reads its
    values asks for `dequantize()` first.

    Attributes:
        qdata: uint8 (bytes,), the container with all tiles (docs/bitstream.md).
        scale: uint8 (rows,) or (1,), codes of signed scales of rows.
        act_pre_scale: uint8 (cols,) or (1,), codes of signed scales of columns.
        zero_point: float32 (rows,) added to rows, or None.
        logical_shape: [rows, cols].
        logical_dtype: dtype that the tensor shows, and decodes to in `dequantize`.
    """

    tensor_data_names = ["qdata", "scale", "act_pre_scale"]  # noqa: RUF012
    tensor_attribute_names = ["logical_shape", "logical_dtype"]  # noqa: RUF012
    optional_tensor_data_names = ["zero_point"]  # noqa: RUF012

    qdata: Tensor
    scale: Tensor
    act_pre_scale: Tensor
    zero_point: Tensor | None
    logical_shape: list[int]
    logical_dtype: torch.dtype

    def __new__(
        cls,
        qdata: Tensor,
        scale: Tensor,
        act_pre_scale: Tensor,
        logical_shape: list[int],
        logical_dtype: torch.dtype,
        zero_point: Tensor | None = None,
    ) -> "CodecTensor":
        tensor: CodecTensor = torch.Tensor._make_wrapper_subclass(
            cls, logical_shape, dtype=logical_dtype, device=qdata.device, requires_grad=False
        )
        return tensor

    def __init__(
        self,
        qdata: Tensor,
        scale: Tensor,
        act_pre_scale: Tensor,
        logical_shape: list[int],
        logical_dtype: torch.dtype,
        zero_point: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.qdata = qdata
        self.scale = scale
        self.act_pre_scale = act_pre_scale
        self.zero_point = zero_point
        self.logical_shape = logical_shape
        self.logical_dtype = logical_dtype

    @classmethod
    def from_hp(
        cls,
        weight: Tensor,
        config: "CodecWeightOnlyConfig",
        pool: ThreadPoolExecutor | None = None,
    ) -> "CodecTensor":
        """Encode a weight.

        Args:
            weight: float32, float16 or bfloat16 (rows, cols), finite.
            config: codec and target.
            pool: runs the encoders; by default the process's own, as many threads as cores.

        Raises:
            ValueError: `weight` is not such a weight.
            RateError: the target cannot be reached; names the nearest that can.
            CodecError: the codec is not available here, or its encoder failed.
        """
        check_weight(weight)
        codec, target, settings = config.resolve()
        codec.require(encoder=True)
        coded = encode_matrix(weight, codec, target, settings, pool or encoder_pool())
        device = weight.device
        return cls(
            coded.qdata.to(device),
            coded.scale.to(device),
            coded.act_pre_scale.to(device),
            list(weight.shape),
            weight.dtype,
            None if coded.zero_point is None else coded.zero_point.to(device),
        )

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """Decode to a dense tensor (rows, cols) of `output_dtype`, by default of this dtype.

        Raises:
            CodecError: the bitstream is corrupt, or its codec is not here.
        """
        weight: Tensor = ops.dequantize(
            self.qdata,
            self.scale,
            self.zero_point,
            self.act_pre_scale,
            *self.logical_shape,
            output_dtype or self.logical_dtype,
        )
        return weight

    @property
    def header(self) -> Header:
        """What the container says of itself; raises CodecError if it is corrupt."""
        return parse_header(self.qdata.detach().cpu().numpy().data)

    @property
    def codec(self) -> str:
        """Name of the codec."""
        return self.header.codec

    @property
    def stored_bytes(self) -> int:
        """Bytes of all inner tensors."""
        return sum(getattr(self, name).nbytes for name in self.__tensor_flatten__()[0])

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for this weight, in bits, over its number of weights."""
        return 8 * self.stored_bytes / self.numel()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        if self.qdata.device.type == "meta" or isinstance(self.qdata, FakeTensor):
            what = "no data"
        else:
            header = self.header
            what = f"codec={header.codec!r}, snr_db={header.snr_db:.2f}"
        return (
            f"CodecTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"{what}, bits_per_weight={self.bits_per_weight:.3f})"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in cls._ATEN_OP_TABLE[cls]:
            raise NotImplementedError(
                f"{func} is not implemented for CodecTensor, which is used through "
                "torch.nn.functional.linear; take the dense weight with .dequantize()"
            )
        return super().__torch_dispatch__(func, types, args, kwargs)


def check_weight(weight: Tensor) -> None:
    """Raise ValueError where a weight cannot be encoded, before any work."""
    if isinstance(weight, CodecTensor):
        raise ValueError("weight is a CodecTensor already; decode it first with .dequantize()")
    if weight.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(map(str, FLOAT_DTYPES))
        raise ValueError(f"weight.dtype={weight.dtype}: allowed: {allowed}")
    if weight.dim() != 2:
        raise ValueError(f"weight.shape={tuple(weight.shape)}: allowed: 2 dimensions (rows, cols)")
    if weight.numel() == 0:
        raise ValueError(f"weight.shape={tuple(weight.shape)}: allowed: at least one weight")
    if weight.device.type == "meta":
        raise ValueError("weight is on the meta device and has no values to encode")
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds NaN or infinity: allowed: finite values")


implements = CodecTensor.implements
implements_torch_function: Callable[..., Any] = CodecTensor.implements_torch_function


@implements_torch_function(torch.nn.functional.linear)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _linear(*args, **kwargs)


@implements(aten.linear.default)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _linear(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, CodecTensor) or isinstance(input, CodecTensor):
        raise NotImplementedError("CodecTensor is a weight of linear, not its input")
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
    elif input.dtype != weight.dtype:
        raise ValueError(
            f"input.dtype={input.dtype} with a weight of {weight.dtype}: convert one with .to()"
        )
    rows, cols = weight.logical_shape
    if input.dim() == 0 or input.shape[-1] != cols:
        raise ValueError(f"input.shape={tuple(input.shape)}: the last dimension must be {cols}")
    output: Tensor = ops.linear(
        input,
        weight.qdata,
        weight.scale,
        weight.zero_point,
        weight.act_pre_scale,
        bias,
        rows,
        cols,
    )
    return output


@implements(aten._to_copy.default)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    self = args[0]
    to = self._get_to_kwargs(*args[1:], **kwargs)
    if to["dtype"] not in FLOAT_DTYPES:
        raise ValueError(f"dtype={to['dtype']}: a CodecTensor can be {FLOAT_DTYPES}")
    moved = self._apply_fn_to_data(lambda t: t.to(to["device"], non_blocking=to["non_blocking"]))
    moved = CodecTensor(
        moved.qdata,
        moved.scale,
        moved.act_pre_scale,
        self.logical_shape,
        to["dtype"],
        moved.zero_point,
    )
    return return_and_correct_aliasing(func, args, kwargs, moved)


@implements(aten.copy_.default)
def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    self, source = args[0], args[1]
    if not isinstance(source, CodecTensor) or not isinstance(self, CodecTensor):
        raise ValueError(
            "copy_ between a CodecTensor and a dense tensor: load with assign=True, or encode or "
            ".dequantize() one of them first"
        )
    names, source_names = self.__tensor_flatten__()[0], source.__tensor_flatten__()[0]
    mine = {name: tuple(getattr(self, name).shape) for name in names}
    theirs = {name: tuple(getattr(source, name).shape) for name in source_names}
    if mine != theirs or self.shape != source.shape:
        raise ValueError(
            f"copy_ from a CodecTensor of other sizes, {theirs}, into {mine}: bitstreams cannot "
            "be resized in place; load with assign=True"
        )
    for name in names:
        getattr(self, name).copy_(getattr(source, name))
    return self


torch.serialization.add_safe_globals([CodecTensor])
