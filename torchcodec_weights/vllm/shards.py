"""A layer's weight in vLLM: collected part by part, then joined from the rows of its shards.

vLLM hands a layer one tensor of a file at a time. For an encoded weight these are its inner tensors
(`models/checkpoint.py`), for others the dense weight. A layer that joins several weights of the
file, as query, key and value, gets them as shards. Which rows and columns of a shard this process
uses is not decided here: vLLM's own loader of the layer is called with numbers of rows and columns
in place of weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.container import parse_header
from torchcodec_weights.matrix.opened import as_array
from torchcodec_weights.tensor import CodecTensor

WEIGHT = "weight"
REQUIRED = tuple(CodecTensor.tensor_data_names)
PARTS = (*REQUIRED, *CodecTensor.optional_tensor_data_names)


class Piece(NamedTuple):
    """Some rows of a layer's weight.

    Attributes:
        first: number of its first row in the layer.
        weight: CodecTensor or dense, (rows, columns).
    """

    first: int
    weight: Tensor


class _Run(NamedTuple):
    """Consecutive rows, or columns, of a shard, and where they go in the layer."""

    target: int
    source: int
    size: int


class ShardedWeight:
    """The weight of one layer in one process, while it is loaded and after.

    Args:
        name: of the layer, for messages.
        rows: rows that this process holds, padding included.
        cols: columns that this process holds.
        dtype: of the weight: float32, float16 or bfloat16.
        place: vLLM's loader of the layer: fills rows or columns of a parameter, its first argument,
            from a tensor of a file, its second; what follows names the shard.
        padded: whether rows at the end may be missing, as those of padded vocabularies are.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        cols: int,
        dtype: torch.dtype,
        place: Callable[..., Any],
        *,
        padded: bool = False,
    ) -> None:
        self.name = name
        self.rows = rows
        self.cols = cols
        self.dtype = dtype
        self.padded = padded
        self.pieces: tuple[Piece, ...] | None = None
        self._place = place
        self._parts: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        self._placed: list[Piece] = []
        self._any = False

    def add(self, part: str, tensor: Tensor, *shard: Any) -> None:
        """Take one tensor of a file.

        Args:
            part: `weight`, or one of `PARTS`.
            tensor: dense weight or CodecTensor of shape (rows, columns) for `weight`, else the
                inner tensor. It is copied, as vLLM's readers may use its memory again.
            shard: what vLLM names the shard by; nothing for a weight that is not joined.

        Raises:
            CodecError: the part came twice, or the weight does not fit the layer.
        """
        if part == WEIGHT:
            self._put(tensor, shard)
            return
        parts = self._parts.setdefault(shard, {})
        if part in parts:
            raise CodecError(f"{self._what(shard)}: {part} is in the checkpoint twice")
        parts[part] = tensor.clone()

    def finish(self, device: torch.device) -> tuple[Piece, ...]:
        """Build the CodecTensors and order the pieces by rows; a second call returns the same.

        Args:
            device: to move the pieces to.

        Raises:
            CodecError: parts or rows are missing, or a bitstream is corrupt, or its codec is not
                available or not allowed.
        """
        if self.pieces is not None:
            return self.pieces
        for shard, parts in self._parts.items():
            self._put(self._built(parts, shard), shard)
        self._parts.clear()
        end = 0
        placed = sorted(self._placed, key=lambda piece: piece.first)
        for first, weight in placed:
            if first != end:
                what = "missing from the checkpoint" if first > end else "in the checkpoint twice"
                raise CodecError(
                    f"{self.name}: rows {min(first, end)}:{max(first, end)} are {what}"
                )
            end += len(weight)
        if end != self.rows and not (self.padded and self._any):
            raise CodecError(f"{self.name}: rows {end}:{self.rows} are missing from the checkpoint")
        self._placed.clear()
        self.pieces = tuple(Piece(first, weight.to(device)) for first, weight in placed)
        return self.pieces

    def _built(self, parts: dict[str, Tensor], shard: tuple[Any, ...]) -> CodecTensor:
        """A CodecTensor of a whole encoded matrix.

        The strings of the file, which vLLM does not hand on, are not needed for it: shape and codec
        are in the container, and the dtype is the layer's.
        """
        if missing := [part for part in REQUIRED if part not in parts]:
            raise CodecError(f"{self._what(shard)}: lacks its parts {', '.join(missing)}")
        try:
            header = parse_header(as_array(parts["qdata"]).data)
            shape = [header.rows, header.cols]
            tensor = CodecTensor(
                parts["qdata"],
                parts["scale"],
                parts["act_pre_scale"],
                shape,
                self.dtype,
                parts.get("zero_point"),
            )
            tensor.check()
        except CodecError as error:
            raise type(error)(f"{self._what(shard)}: {error}") from None
        return tensor

    def _put(self, weight: Tensor, shard: tuple[Any, ...]) -> None:
        """Take the rows and columns of a shard that this process uses."""
        try:
            rows, cols = weight.shape
            kept_rows = self._kept(rows, self.rows, 0, shard)
            kept_cols = [_Run(0, 0, cols)]
            if cols != self.cols:
                kept_cols = self._kept(cols, self.cols, 1, shard)
            [(start, col, count)] = kept_cols
            if (start, count) != (0, self.cols):
                raise ValueError(f"columns {start}:{start + count} of {self.cols}")
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise CodecError(
                f"{self._what(shard)}: a weight of shape {tuple(weight.shape)} does not fit a "
                f"layer that holds {self.rows} rows and {self.cols} columns of it: {error}"
            ) from None
        self._any = True
        weight = weight.detach().to(self.dtype)
        for target, source, size in kept_rows:
            piece = weight[source : source + size, col : col + count].clone()
            self._placed.append(Piece(target, piece))

    def _kept(self, size: int, held: int, dim: int, shard: tuple[Any, ...]) -> list[_Run]:
        """Rows or columns of a shard that vLLM's loader puts into this process's weight.

        Args:
            size: rows or columns of the shard.
            held: of this process's weight.
            dim: 0 for rows, 1 for columns.
            shard: what vLLM names the shard by.
        """
        other = 1 - dim
        numbers = torch.arange(1, size + 1, device="cpu").unsqueeze(other)
        target = torch.zeros(held, dtype=torch.int64, device="cpu").unsqueeze(other)
        parameter = nn.Parameter(target, requires_grad=False)
        setattr(parameter, ("output_dim", "input_dim")[dim], dim)
        self._place(parameter, numbers, *shard)
        placed = parameter.data.flatten()
        targets = placed.nonzero().flatten()
        sources = placed[targets] - 1
        breaks = ((targets.diff() != 1) | (sources.diff() != 1)).nonzero().flatten() + 1
        runs = zip(targets.tensor_split(breaks), sources.tensor_split(breaks), strict=True)
        return [_Run(int(t[0]), int(s[0]), len(t)) for t, s in runs if len(t)]

    def _what(self, shard: tuple[Any, ...]) -> str:
        return " ".join([self.name, *(f"shard {part!r}" for part in shard)])
