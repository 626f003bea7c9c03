"""CodecTensor: a weight held as a bitstream, decoded when it is used."""

import reprlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from torchcodec_weights import third_party
from torchcodec_weights.config import CodecWeightOnlyConfig
from torchcodec_weights.encoder.encode import encode_matrix
from torchcodec_weights.errors import CodecError
from torchcodec_weights.format import layout
from torchcodec_weights.format.container import Header, parse_header, select_tiles
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.checks import check_attributes, check_binding, named
from torchcodec_weights.matrix.dtypes import FLOAT_DTYPES
from torchcodec_weights.matrix.geometry import refused_geometry, resolved_window
from torchcodec_weights.matrix.opened import as_array, check_arrays, open_matrix
from torchcodec_weights.pytorch import operators
from torchcodec_weights.system.workers import encoder_pool

_MIN_COLS = 32
_INNER = ["codec_qdata", "scale", "act_pre_scale"]
_INNER_WITH_ZERO_POINT = [*_INNER, "zero_point"]

# Bitstreams differ in length from layer to layer. If the length were a constant, torch.compile
# would compile the same code again for every layer. The pattern matches no other tensor's source,
# as no other class has an attribute `codec_qdata`.
_DYNAMIC_SOURCE = r".*\.codec_qdata:0"
third_party.vary_lengths(_DYNAMIC_SOURCE)

_GRAPHS = 2
"""Raised when compiled graphs are to call other operators, as the compiler keeps graphs on disk."""


class CodecTensor(TorchAOBaseTensor):
    """A weight held as a bitstream: all of an encoded matrix, or some rows and columns of it.

    It replaces the dense weight in `linear`, `matmul`, `bmm`, convolutions and `embedding`, and can
    be moved, sliced, copied and saved. All other operations on its values need `dequantize()`
    first. It is frozen: `requires_grad` stays False.

    A weight of more than two dimensions is encoded as a matrix: its last dimensions are joined
    until a row has at least 32 weights, and the others are the rows. So a kernel (out, in, height,
    width) is encoded as a matrix (out, in · height · width), and experts (experts, out, in) as a
    matrix (experts · out, in).

    Slices share the bitstream; `contiguous()` or `clone()` of a slice keeps only the tiles in it.

    A tensor that was built from inner tensors, for example those of a file, is checked at the first
    operation on it: types and shapes, whether the attributes match the container, and everything
    in the container except the tiles, which are checked at each use. CodecError if a check fails
    (docs/security.md).

    Attributes:
        qdata: uint8 (bytes,), the container with the tiles (docs/bitstream.md).
        scale: uint8 (matrix rows,) or (1,), codes of signed scales of rows.
        act_pre_scale: uint8 (matrix columns,) or (1,), codes of signed scales of columns.
        zero_point: float32 (matrix rows,) added to rows, or None.
        logical_shape: shape of the tensor.
        logical_dtype: dtype of the tensor, and of the result of `dequantize`.
        window: the rows and columns of the encoded matrix that this weight consists of, as first
            row, rows, first column, columns; None for all of a matrix of `logical_shape`.
        transposed: whether the last two dimensions are swapped; None for False.
    """

    tensor_data_names = [*layout.DATA_NAMES]  # noqa: RUF012
    tensor_attribute_names = [*layout.ATTRIBUTE_NAMES]  # noqa: RUF012
    optional_tensor_data_names = [*layout.OPTIONAL_DATA_NAMES]  # noqa: RUF012
    optional_tensor_attribute_names = [*layout.OPTIONAL_ATTRIBUTE_NAMES]  # noqa: RUF012

    qdata: Tensor
    scale: Tensor
    act_pre_scale: Tensor
    zero_point: Tensor | None
    logical_shape: list[int]
    logical_dtype: torch.dtype
    window: list[int] | None
    transposed: bool | None
    # The tensor without a bitstream that this is a view of; `copy_` into the view fills both.
    empty_base: "CodecTensor | None" = None
    _checked: bool = False
    _binding: list[str] | None = None

    def __new__(
        cls,
        qdata: Tensor,
        scale: Tensor | None = None,
        act_pre_scale: Tensor | None = None,
        logical_shape: list[int] | None = None,
        logical_dtype: torch.dtype | None = None,
        zero_point: Tensor | None = None,
        window: list[int] | None = None,
        transposed: bool | None = None,
        binding: list[str] | None = None,
        requires_grad: bool = False,
    ) -> "CodecTensor":
        # accelerate calls CodecTensor(weight, requires_grad=…) to make a moved weight a parameter.
        if isinstance(qdata, CodecTensor):
            logical_shape, logical_dtype = list(qdata.shape), qdata.dtype
        elif _refused_geometry(logical_shape, logical_dtype, window, transposed):
            # No tensor can have such a shape. `check` raises the error, with the weight's name.
            logical_shape, logical_dtype = [0], torch.float32
        tensor: CodecTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            cast(list[int], logical_shape),
            dtype=logical_dtype,
            device=qdata.device,
            requires_grad=False,
        )
        return tensor

    def __init__(
        self,
        qdata: Tensor,
        scale: Tensor | None = None,
        act_pre_scale: Tensor | None = None,
        logical_shape: list[int] | None = None,
        logical_dtype: torch.dtype | None = None,
        zero_point: Tensor | None = None,
        window: list[int] | None = None,
        transposed: bool | None = None,
        binding: list[str] | None = None,
        requires_grad: bool = False,
    ) -> None:
        # Not super().__init__(), which only logs the class's name, for each weight anew.
        if isinstance(qdata, CodecTensor):
            self.__dict__.update(qdata.__dict__)
            third_party.mark_parameter(self)
            return
        self._binding = binding
        self.qdata = qdata
        # Missing or wrong values are refused by `check`.
        self.scale = cast(Tensor, scale)
        self.act_pre_scale = cast(Tensor, act_pre_scale)
        self.zero_point = zero_point
        self.logical_shape = cast(list[int], logical_shape)
        self.logical_dtype = cast(torch.dtype, logical_dtype)
        self.window = window
        self.transposed = transposed

    @property
    def codec_qdata(self) -> Tensor:
        """`qdata`, under the name that tells the compiler that its length varies."""
        return self.qdata

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        # Compiled code calls this for every weight at every run.
        return _INNER if self.zero_point is None else _INNER_WITH_ZERO_POINT, {
            "logical_shape": self.logical_shape,
            "logical_dtype": self.logical_dtype,
            "window": self.window,
            "transposed": self.transposed,
        }

    @classmethod
    def __tensor_unflatten__(
        cls,
        tensors: dict[str, Tensor],
        attributes: dict[str, Any],
        outer_size: Any,
        outer_stride: Any,
    ) -> "CodecTensor":
        return cls(
            tensors["codec_qdata"],
            tensors["scale"],
            tensors["act_pre_scale"],
            attributes["logical_shape"],
            attributes["logical_dtype"],
            tensors.get("zero_point"),
            attributes["window"],
            attributes["transposed"],
        ).mark_checked()

    def _stable_hash_for_caching(self) -> str:
        """Key of a weight in the compiler's caches on disk: everything except its bytes."""
        names, attributes = self.__tensor_flatten__()
        inner = [(name, getattr(self, name)) for name in names]
        what = [(name, t.dtype, list(map(str, t.shape)), t.device) for name, t in inner]
        return repr((type(self).__qualname__, _GRAPHS, attributes, what))

    @classmethod
    @torch.compiler.disable(reason="encoders of torchcodec_weights read and write bytes")
    def from_hp(
        cls,
        weight: Tensor,
        config: CodecWeightOnlyConfig,
        pool: ThreadPoolExecutor | None = None,
    ) -> "CodecTensor":
        """Encode a weight. In a function that is compiled, the graph ends before it.

        Args:
            weight: float32, float16 or bfloat16, finite, of two dimensions or more.
            config: codec and target.
            pool: runs the encoders; by default one pool of the process, a thread for each core.

        Raises:
            ValueError: `weight` does not meet these conditions.
            RateError: the target cannot be reached; names the nearest target that can.
            CodecError: the codec is not available, or its encoder failed.
        """
        check_weight(weight)
        if not isinstance(config, CodecWeightOnlyConfig):
            raise ValueError(f"config={reprlib.repr(config)}: allowed: codec_weight_only(...)")
        codec, target, settings = config.resolve()
        codec.require(encoder=True)
        codec.check_parameters(settings)
        shape = list(weight.shape)
        rows, cols = _matrix_shape(shape)
        matrix = weight.detach().resolve_neg().reshape(rows, cols)
        if config.importance is not None:
            config.importance.check(rows, cols)
        coded = encode_matrix(
            matrix, codec, target, settings, pool or encoder_pool(), importance=config.importance
        )
        device = weight.device
        return cls(
            coded.qdata.to(device),
            coded.scale.to(device),
            coded.act_pre_scale.to(device),
            shape,
            weight.dtype,
            None if coded.zero_point is None else coded.zero_point.to(device),
            None if len(shape) == 2 else [0, rows, 0, cols],
        ).mark_checked()

    def mark_checked(self) -> "CodecTensor":
        """Mark the tensor as checked, as its inner tensors have been checked; returns itself."""
        self._checked = True
        return self

    def check(self, allowed_codecs: Iterable[str] | None = None) -> None:
        """Check everything except the tiles, once; see the class, and docs/security.md for reasons.

        Args:
            allowed_codecs: names of codecs that may decode it, a second limit beside the process's
                (`policy.allowed_codecs`); None for no second limit.

        Raises:
            CodecError: a check failed; names the first.
        """
        binding = self._binding
        check_binding(binding)
        try:
            self._check(allowed_codecs)
        except CodecError as error:
            if binding is None:
                raise
            raise named(error, binding) from None
        self.mark_checked()

    def _check(self, allowed_codecs: Iterable[str] | None) -> None:
        if self.logical_shape is None and self.scale is None:
            raise CodecError(
                "was made of a dense tensor, as accelerate does where weights that transformers "
                "was to encode are offloaded to disk; encode the checkpoint first (the command "
                "compress), and leave disk out of the device_map"
            )
        reason = _refused_geometry(
            self.logical_shape, self.logical_dtype, self.window, self.transposed
        )
        if reason:
            raise CodecError(reason)
        with third_party.without_torch_function():
            shape, dtype = list(self.shape), self.dtype
        if shape != self.logical_shape or dtype != self.logical_dtype:
            raise CodecError(
                f"shows shape {shape} and {dtype}, and says logical_shape={self.logical_shape} and "
                f"logical_dtype={self.logical_dtype}"
            )
        arrays = self.qdata, self.scale, self.zero_point, self.act_pre_scale
        if type(self.qdata) is not Tensor and third_party.is_tracer(self.qdata):
            return  # there are no data to check
        check_arrays(*arrays)
        if self.qdata.device.type == "meta":
            return
        header = open_matrix(*arrays, arrays_checked=True).header
        check_attributes(
            header,
            self.logical_shape,
            self.window,
            self.transposed,
            self._binding,
            allowed_codecs,
        )

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """Decode to a dense tensor of the same shape.

        Args:
            output_dtype: float32, float16 or bfloat16; None for the dtype of this tensor. Weights
                are decoded in float32 arithmetic, so float64 would have no more precision; for
                float64 call `.double()` on the result.

        Raises:
            ValueError: `output_dtype` is another dtype.
            CodecError: the bitstream is corrupt, or its codec is not available.
        """
        coded, window = self.coded, self.resolved_window  # these check the tensor first
        dtype = self.logical_dtype if output_dtype is None else output_dtype
        if dtype not in FLOAT_DTYPES:
            allowed = ", ".join(map(str, FLOAT_DTYPES))
            raise ValueError(
                f"output_dtype={dtype!r}: allowed: {allowed}, or None; convert the result to others"
            )
        weight: Tensor = operators.dequantize(*coded, window, dtype)
        if self.transposed:
            *outer, a, b = self.logical_shape
            return weight.view(*outer, b, a).transpose(-2, -1)
        return weight.view(self.logical_shape)

    @property
    def coded(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """qdata, scale, zero_point and act_pre_scale, as the operators take them."""
        if not self._checked:
            self.check()
        return self.codec_qdata, self.scale, self.zero_point, self.act_pre_scale

    @property
    def resolved_window(self) -> list[int]:
        """First row, rows, first column, columns: `window`, or the whole matrix if it is None."""
        if not self._checked:
            self.check()
        return resolved_window(self.logical_shape, self.window, self.transposed)

    @property
    def header(self) -> Header:
        """Header of the container; raises CodecError if it is corrupt."""
        return parse_header(as_array(self.qdata).data)

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
        """Bits of all inner tensors, divided by the number of weights."""
        return 8 * self.stored_bytes / self.numel()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        # Tensors of tracers have sizes that are symbols, and no bytes.
        if self.qdata.device.type == "meta" or type(self.qdata) is not Tensor:
            what = "no data"
        else:
            header = self.header
            what = (
                f"codec={header.codec!r}, snr_db={header.snr_db:.2f}, "
                f"bits_per_weight={self.bits_per_weight:.3f}"
            )
        return (
            f"CodecTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"{what})"
        )

    def with_data(self, function: Any) -> "CodecTensor":
        """A copy of the tensor with a function applied to each inner tensor."""
        return self._apply_fn_to_data(function).mark_checked()

    def with_shape(
        self, shape: Sequence[int], window: Sequence[int], transposed: bool | None = None
    ) -> "CodecTensor":
        """Another view of the same bitstream."""
        return CodecTensor(
            self.qdata,
            self.scale,
            self.act_pre_scale,
            list(shape),
            self.logical_dtype,
            self.zero_point,
            list(window),
            self.transposed if transposed is None else transposed,
        ).mark_checked()

    def compact(self) -> "CodecTensor":
        """The same weight with a container of only the tiles that it needs."""
        if self.window is None or self.qdata.device.type == "meta":
            return self
        matrix = open_matrix(*self.coded)
        window = Window(*self.window)
        tiles = matrix.tiles(window.first_row, window.first_row + window.rows)
        if len(tiles) == len(matrix.header.tiles):
            return self
        data = as_array(self.qdata).data
        kept = torch.from_numpy(select_tiles([data], [matrix.header], tiles))
        compact = self.with_shape(self.logical_shape, window)
        compact.qdata = kept.to(self.qdata.device)
        return compact

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        implementation = third_party.implemented_functions(cls).get(func)
        if implementation is None:
            return super().__torch_function__(func, types, args, kwargs)
        _check_all(args)
        _check_all(kwargs.values())
        # As the base class would, for each call of each layer.
        return implementation(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in third_party.implemented_operators(cls):
            # In inference mode operators that are made of others come whole.
            made = func.decompose(*args, **(kwargs or {}))
            if made is NotImplemented:
                raise NotImplementedError(_unsupported(func))
            return made
        _check_all(args)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _refused_geometry(
    logical_shape: Any, logical_dtype: Any, window: Any, transposed: Any
) -> str | None:
    """As `refused_geometry`, with PyTorch's dtypes; sizes of tracers are symbols."""
    return refused_geometry(
        logical_shape, logical_dtype, window, transposed, FLOAT_DTYPES, (torch.SymInt,)
    )


def _check_all(values: Iterable[Any]) -> None:
    """Check the CodecTensors among some values that have not been checked yet."""
    for value in values:
        if type(value) is CodecTensor and not value._checked:
            value.check()


def _unsupported(func: Any) -> str:
    name = str(func)
    if name.startswith("aten.") and name.split(".")[1] in _IN_PLACE:
        return (
            f"{func} would write into a CodecTensor, which is a bitstream and frozen. To merge an "
            "adapter (LoRA) into it, go back to dense weights with decompress_(model), merge, and "
            "encode again with quantize_"
        )
    return (
        f"{func} is not implemented for CodecTensor, which is used through linear, matmul, bmm, "
        "convolution and embedding; take the dense weight with .dequantize()"
    )


_IN_PLACE = ("add_", "sub_", "mul_", "div_", "addcmul_", "addcdiv_", "lerp_", "fill_", "zero_")


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the matrix that a weight is encoded as; see `CodecTensor`."""
    first = len(shape) - 1
    while first > 1 and prod(shape[first:]) < _MIN_COLS:
        first -= 1
    return prod(shape[:first]), prod(shape[first:])


def check_weight(weight: Tensor) -> None:
    """Raise ValueError if a weight cannot be encoded."""
    if not isinstance(weight, Tensor):
        raise ValueError(f"weight={reprlib.repr(weight)}: allowed: a torch.Tensor")
    if isinstance(weight, CodecTensor):
        raise ValueError("weight is a CodecTensor already; decode it first with .dequantize()")
    if weight.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(map(str, FLOAT_DTYPES))
        raise ValueError(f"weight.dtype={weight.dtype}: allowed: {allowed}")
    if weight.layout != torch.strided or weight.is_nested:
        kind = "nested" if weight.is_nested else weight.layout
        raise ValueError(f"weight.layout={kind}: allowed: torch.strided, a dense tensor")
    if weight.dim() < 2:
        raise ValueError(f"weight.shape={tuple(weight.shape)}: allowed: 2 dimensions or more")
    if weight.numel() == 0:
        raise ValueError(f"weight.shape={tuple(weight.shape)}: allowed: at least one weight")
    if weight.device.type == "meta":
        raise ValueError("weight is on the meta device and has no values to encode")
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds NaN or infinity: allowed: finite values")


_REQUIRED = {*CodecTensor.tensor_data_names, *CodecTensor.tensor_attribute_names}
_OPTIONAL = {
    *CodecTensor.optional_tensor_data_names,
    *CodecTensor.optional_tensor_attribute_names,
}
_TRANSIENT = {"empty_base", "_checked", "_binding"}

_deferred = ContextVar("_deferred", default=False)


@contextmanager
def deferred_checks() -> Iterator[None]:
    """Unpickle weights without checks, for callers that check each weight themselves."""
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


def _set_state(self: CodecTensor, state: Any) -> None:
    """Unpickle; attributes that older files do not have become None.

    Other attributes are kept, for example those of a Parameter, unless one has the name of an
    attribute or method of the class.
    """
    if not isinstance(state, dict) or not state.keys() >= _REQUIRED:
        raise CodecError(f"a pickled CodecTensor lacks parts: needed: {sorted(_REQUIRED)}")
    kept = {name: value for name, value in state.items() if name not in _TRANSIENT}
    for name in kept.keys() - _REQUIRED - _OPTIONAL:
        if not isinstance(name, str) or hasattr(CodecTensor, name):
            raise CodecError(f"a pickled CodecTensor has the attribute {name!r}, which is ours")
    self.__dict__.update(dict.fromkeys(_OPTIONAL), **kept)
    if not _deferred.get():
        self.check()


# The base class sets its own in each subclass.
CodecTensor.__setstate__ = _set_state
