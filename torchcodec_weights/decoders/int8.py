"""A weight as int8 levels with scales, made from the decoded one and multiplied by as it is.

    W[i, j] = row_scale[i] · (level[i, j] + exact) · col_scale[j] + zero_point[i]

Scales of columns are those of the bitstream, so that levels are of the normalized matrix, where the
codec's error is the same everywhere: the error of levels adds to it alike. A row's step is chosen
here. Weights far out keep what their level lacks as a float, so they do not make the step larger.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchcodec_weights.codecs.common import int8
from torchcodec_weights.decoders import choice
from torchcodec_weights.errors import CodecError
from torchcodec_weights.format import container
from torchcodec_weights.format.dtypes import dtype_name
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.normalize import robust_rms
from torchcodec_weights.matrix.opened import OpenedMatrix

_LARGEST = 127

_DEVIATIONS = 5.0
"""Root mean squares of a row up to which its levels reach. On SmolLM2 at 3 bits levels then cost
0.013 to 0.020 dB, and what the others lack takes 0.1 % of the memory; up to the largest weight they
would cost 0.013 to 0.029 dB."""

_LEAST_REACH = 2.0**-20  # of a row's peak; a row of zeros but for one weight has no deviation

FUSED_TOKENS = {torch.float32: 64, torch.bfloat16: 16, torch.float16: None}
"""Most tokens by dtype that are multiplied by levels; for more, decoded rows go through a matrix
product, which is faster from there (benchmarks/int8.py). None: PyTorch's products never are."""

_TOKENS = 64  # at a time; their scaled activations are kept as floats
_DECODED = 2**20  # weights that go through a matrix product at a time
_GROUP = 2**22  # weights that are decoded from the bitstream at a time


@dataclass(eq=False)
class Int8Weight:
    """A weight as int8 levels, on the CPU.

    Attributes:
        window: the rows and columns of the encoded matrix that the weight consists of.
        levels: int8 (rows, cols), of any row stride; `int8.PADDING` levels follow the last row.
        row_scale: float32 (rows,).
        col_scale: float32 (cols,), or None for 1.
        zero_point: float32 (rows,), or None for 0.
        exact_starts: int32 (rows + 1,), where the values of each row begin in the next two.
        exact_columns: int32, columns counted from `first_col` columns before the window.
        exact_values: float32, what these levels lack.
        first_col: of the window, in the weight that was made.
        snr_db: energy of the decoded weights over that of the levels' error, in dB.
        form: its name.
    """

    window: Window
    levels: Tensor
    row_scale: Tensor
    col_scale: Tensor | None
    zero_point: Tensor | None
    exact_starts: Tensor
    exact_columns: Tensor
    exact_values: Tensor
    first_col: int
    snr_db: float
    form: str = "int8"

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = (
            self.levels, self.row_scale, self.col_scale, self.zero_point, self.exact_starts,
            self.exact_columns, self.exact_values,
        )  # fmt: skip
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def parts(self) -> tuple[Any, ...]:
        """The arguments of the operator `keep_levels` after the window."""
        return (
            self.levels, self.levels.stride(0), self.row_scale, self.col_scale, self.zero_point,
            self.exact_starts, self.exact_columns, self.exact_values, self.first_col,
        )  # fmt: skip

    def part(self, window: Window) -> "Int8Weight":
        """Some of its rows and columns, in the same memory.

        Args:
            window: of the encoded matrix, within this weight's.
        """
        rows, cols = self.window.slices_of(window)
        return Int8Weight(
            window,
            self.levels[rows, cols],
            self.row_scale[rows],
            None if self.col_scale is None else self.col_scale[cols],
            None if self.zero_point is None else self.zero_point[rows],
            self.exact_starts[rows.start : rows.stop + 1],
            self.exact_columns,
            self.exact_values,
            self.first_col + cols.start,
            self.snr_db,
        )

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x @ W.T + bias, summed in float32; None for a dtype that weights do not have.

        Args:
            x: (tokens, cols), on the CPU.
            bias: (rows,), or None.

        Returns:
            (tokens, rows) of x's dtype.
        """
        if x.dtype not in FUSED_TOKENS:
            return None
        if bias is not None:
            bias = bias.to(x.dtype).contiguous()
        most = FUSED_TOKENS[x.dtype]
        if most is None or len(x) <= most:
            return self.multiply_levels(x, bias)
        return self.multiply_decoded(x, bias)

    def multiply_levels(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`multiply` by the levels; x and bias are of one dtype, bias is contiguous."""
        x, threads, dtype = x.contiguous(), torch.get_num_threads(), dtype_name(x.dtype)
        out = x.new_empty(len(x), self.window.rows)
        added = None if bias is None else bias.data_ptr()
        for first in range(0, len(x), _TOKENS):
            tokens, place = min(_TOKENS, len(x) - first), first * x.element_size()
            int8.multiply(
                self._view,
                x.data_ptr() + place * self.window.cols,
                tokens,
                added,
                out.data_ptr() + place * self.window.rows,
                dtype,
                threads,
            )
        return out

    def multiply_decoded(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`multiply` by some rows at a time, decoded into one buffer."""
        rows, cols = self.window.rows, self.window.cols
        step = max(1, _DECODED // cols)
        out = x.new_empty(len(x), rows)
        buffer = torch.empty(min(step, rows), cols, dtype=x.dtype)
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            some = buffer[: part.stop - first]
            self._decode_into(some, first)
            added = None if bias is None else bias[part]
            out[:, part] = torch.nn.functional.linear(x, some, added)
        return out

    def decoded(self, dtype: torch.dtype) -> Tensor | None:
        """The weights that the levels stand for, (rows, cols) of `dtype`; None as `multiply`."""
        if dtype not in FUSED_TOKENS:
            return None
        out = torch.empty(self.window.rows, self.window.cols, dtype=dtype)
        self._decode_into(out, 0)
        return out

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Rows of `decoded`.

        Args:
            indices: integers of any shape, on the CPU.

        Returns:
            (indices.numel(), cols) of `dtype`.

        Raises:
            IndexError: an index is outside the rows.
        """
        if dtype not in FUSED_TOKENS:
            return None
        flat = indices.reshape(-1).to(torch.int64).contiguous()
        out = torch.empty(len(flat), self.window.cols, dtype=dtype)
        if not len(flat):
            return out
        first, last = (int(end) for end in flat.aminmax())
        if first < 0 or last >= self.window.rows:
            raise IndexError(
                f"indices from {first} to {last} into a weight of {self.window.rows} rows"
            )
        threads = torch.get_num_threads()
        int8.rows(
            self._view, flat.data_ptr(), len(flat), out.data_ptr(), dtype_name(dtype), threads
        )
        return out

    def _decode_into(self, out: Tensor, first: int) -> None:
        """Decode consecutive rows from `first` on."""
        row, _, col, cols = self.window
        part = self if first == 0 else self.part(Window(row + first, len(out), col, cols))
        threads, dtype = torch.get_num_threads(), dtype_name(out.dtype)
        int8.rows(part._view, None, len(out), out.data_ptr(), dtype, threads)

    @cached_property
    def _view(self) -> int8.Int8Matrix:
        return int8.Int8Matrix(
            levels=self.levels.data_ptr(),
            stride=self.levels.stride(0),
            rows=self.window.rows,
            cols=self.window.cols,
            row_scale=self.row_scale.data_ptr(),
            col_scale=None if self.col_scale is None else self.col_scale.data_ptr(),
            zero_point=None if self.zero_point is None else self.zero_point.data_ptr(),
            exact_starts=self.exact_starts.data_ptr(),
            exact_columns=self.exact_columns.data_ptr(),
            exact_values=self.exact_values.data_ptr(),
            first_col=self.first_col,
        )


def int8_weight(matrix: OpenedMatrix, window: Window) -> Int8Weight:
    """Decode a window of a matrix once, to int8 levels.

    No more of it is dense at a time than some tiles.

    Raises:
        CodecError: a tile is corrupt, or weights are too large to be divided by their scales.
        CodecUnavailableError: the compiled library is missing.
    """
    container.check_window(matrix.header, window)
    stored = matrix.stored()
    rows, cols = window.rows, window.cols
    columns = slice(window.first_col, window.first_col + cols)
    with torch.inference_mode(False), torch.no_grad():
        flat = torch.empty(rows * cols + int8.PADDING, dtype=torch.int8)
        flat[rows * cols :] = 0
        levels = flat[: rows * cols].view(rows, cols)
        row_scale = torch.empty(rows)
        col_scale = zero_point = None
        if len(stored.col_scale) > 1:
            col_scale = torch.from_numpy(np.array(stored.col_scale[columns], np.float32))
        if stored.zero_point is not None:
            last = window.first_row + rows
            zero_point = torch.from_numpy(np.array(stored.zero_point[window.first_row : last]))
        counts = torch.zeros(rows + 1, dtype=torch.int64)
        exact: list[tuple[Tensor, Tensor]] = []
        energy = noise = 0.0
        for first, end in _tile_groups(matrix, window):
            part = Window(first, end - first, window.first_col, cols)
            w = choice.decode(matrix, part, torch.float32, torch.device("cpu"))
            here = slice(first - window.first_row, end - window.first_row)
            energy += float(w.double().square().sum())
            if zero_point is not None:
                w = w - zero_point[here, None]
            if col_scale is not None:
                w = w / col_scale
            peaks = w.abs().amax(1, keepdim=True)
            if not bool(torch.isfinite(peaks).all()):
                raise CodecError("weights are too large for int8 levels: keep them as bits")
            w /= torch.where(peaks > 0, peaks, 1)
            reach = _reach(w)
            w *= _LARGEST / reach
            row_scale[here] = (peaks * reach / _LARGEST).view(-1)
            part_levels = w.round().clamp_(-_LARGEST, _LARGEST)
            levels[here] = part_levels.to(torch.int8)
            w -= part_levels
            far = w.abs() > 0.5
            counts[1:][here] = far.sum(1)
            exact.append((far.nonzero()[:, 1].to(torch.int32), w[far]))
            w[far] = 0
            w *= row_scale[here, None]
            if col_scale is not None:
                w *= col_scale
            noise += float(w.double().square().sum())
    snr_db = float(10 * np.log10(energy / noise)) if noise and energy else np.inf
    return Int8Weight(
        window,
        levels,
        row_scale,
        col_scale,
        zero_point,
        counts.cumsum(0).to(torch.int32),
        torch.cat([columns for columns, _ in exact]),
        torch.cat([values for _, values in exact]),
        0,
        snr_db,
    )


def _reach(w: Tensor) -> Tensor:
    """What the largest level of each row stands for, (rows, 1), for rows whose peaks are 1 or 0."""
    reach = _DEVIATIONS * w.square().mean(1, keepdim=True).sqrt()
    wide = (reach < 1).view(-1).nonzero().view(-1)
    if len(wide):
        # Those far out must not count in the deviation that says how far out they are.
        deviations = robust_rms(w[wide].numpy(), _DEVIATIONS, 1)
        reach[wide, 0] = _DEVIATIONS * torch.from_numpy(deviations)
    return reach.clamp(_LEAST_REACH, 1)


def _tile_groups(matrix: OpenedMatrix, window: Window) -> Iterator[tuple[int, int]]:
    """Rows of a window in groups of whole tiles, of about `_GROUP` weights."""
    first, end = window.first_row, window.first_row + window.rows
    blocks = matrix.header.blocks
    start = first
    for tile in matrix.tiles(first, end):
        stop = min(blocks[tile].end_row, end)
        if stop == end or (stop - start) * matrix.header.cols >= _GROUP:
            if stop > start:
                yield start, stop
            start = stop
