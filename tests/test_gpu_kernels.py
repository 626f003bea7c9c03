"""ECTCQ's CUDA kernels without a GPU: compiled by NVRTC, and the same source run on the CPU."""

import contextlib
import ctypes
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_ectcq_columns import cut, stored_matrix, varied
from test_ectcq_columns import decoded as decoded_columns
from test_order import important
from torch import Tensor

from torchcodec_weights import (
    CodecError,
    CodecTensor,
    CodecUnavailableError,
    codec_weight_only,
    use_decoder,
)
from torchcodec_weights.codecs.common import cubins, cuda, nvrtc
from torchcodec_weights.codecs.common.cuda import Launch
from torchcodec_weights.codecs.ectcq import ECTCQ, gpu, gpu_columns
from torchcodec_weights.codecs.ectcq.columns import (
    ColumnModel,
    decoder_classes_of_matrix,
    groups_of,
    is_by_columns,
)
from torchcodec_weights.codecs.ectcq.gpu import ResidentMatrix
from torchcodec_weights.codecs.ectcq.gpu_columns import ResidentColumns
from torchcodec_weights.codecs.ectcq.model import tables_of_matrix
from torchcodec_weights.codecs.ectcq.resident import KERNELS, index_matrix
from torchcodec_weights.codecs.records import StoredMatrix
from torchcodec_weights.decoders import choice
from torchcodec_weights.decoders.cpu import decode_matrix
from torchcodec_weights.format.container import exact_weights, read_tile
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.opened import OpenedMatrix, open_matrix

HERE = Path(__file__).parent
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build(target: Path, *flags: str) -> Path:
    """cuda_host.cpp as a library."""
    command = ["g++", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", *flags]
    command += ["-fno-strict-aliasing", "-Wno-unknown-pragmas", f"-I{gpu.SOURCE.parent}"]
    subprocess.run([*command, str(HERE / "cuda_host.cpp"), "-o", str(target)], check=True)
    return target


def host_launch(library: Path, seed: int = 0) -> Launch:
    """Starts kernels on the CPU; the seed chooses in what order threads go on."""
    lib = ctypes.CDLL(str(library))
    lib.cuda_host_launch.restype = ctypes.c_char_p

    def launch(
        kernel: str,
        blocks: int,
        threads: int,
        *arguments: int,
        shared: int = 0,
        programmatic: bool = False,
    ) -> None:
        values = (ctypes.c_uint64 * len(arguments))(*arguments)
        counts = (ctypes.c_uint64(number) for number in (blocks, threads, shared))
        error = lib.cuda_host_launch(kernel.encode(), *counts, values, ctypes.c_uint64(seed))
        assert error is None, error.decode()

    return launch


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cuda_host") / "kernels.so", "-O2", "-Wall", "-Werror")


@pytest.fixture(scope="session")
def launch(library: Path) -> Launch:
    return host_launch(library)


def coded(
    rows: int,
    cols: int,
    step: float = 0.55,
    preset: str = "best",
    dtype: torch.dtype = torch.float32,
) -> CodecTensor:
    """A weight with outliers at its corners and elsewhere."""
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * cols))
    weight[:, : cols // 2] *= 3
    for row, col, value in (
        (0, 0, 40),
        (0, cols // 2, -33),
        (rows // 2, cols // 3, 90),
        (-1, -1, -55),
    ):
        weight[row, col] = value
    config = codec_weight_only("ectcq", step=step, preset=preset)
    return CodecTensor.from_hp(weight.to(dtype), config)


def opened(weight: CodecTensor, odd: bool | None = None) -> OpenedMatrix:
    """A weight's matrix.

    Args:
        odd: whether its words are to lie at odd addresses; None leaves it to chance.
    """
    qdata = weight.qdata
    matrix = open_matrix(qdata, weight.scale, weight.zero_point, weight.act_pre_scale)
    if odd is None or (qdata.data_ptr() + int(matrix.stored().offsets[0])) % 2 == odd:
        return matrix
    moved = torch.empty(len(qdata) + 2, dtype=torch.uint8)[1:][: len(qdata)].copy_(qdata)
    return open_matrix(moved, weight.scale, weight.zero_point, weight.act_pre_scale)


def dense(matrix: OpenedMatrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the CPU's decoder makes of a matrix."""
    return decode_matrix(matrix, Window(0, matrix.header.rows, 0, matrix.header.cols), dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


SHAPES = [(64, 576), (300, 384), (7, 4096), (50, 77), (96, 20), (1, 33), (5, 1)]


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("step", "preset"), [(1.1, "medium"), (0.3, "best"), (0.05, "fast")])
def test_weights_are_those_of_the_cpu(
    shape: tuple[int, int], step: float, preset: str, launch: Launch
) -> None:
    weight = coded(*shape, step, preset, torch.bfloat16)
    for odd in (False, True):
        matrix = opened(weight, odd)
        resident = index_matrix(matrix, launch)
        for dtype in DTYPES:
            expected = dense(matrix, dtype)
            assert same_bits(resident.decode(0, shape[0], dtype), expected)
            for first in {0, shape[0] // 3, shape[0] - 1}:
                end = min(first + 5, shape[0])
                assert same_bits(resident.decode(first, end, dtype), expected[first:end])


@needs_compiler
def test_many_segments_and_any_order_of_threads(library: Path) -> None:
    weight = coded(640, 1024, preset="fast")
    matrix = opened(weight)
    expected = dense(matrix)
    for seed in range(3):
        resident = index_matrix(matrix, host_launch(library, seed))
        assert resident.segments == 160 > len(matrix.header.blocks)
        assert same_bits(resident.decode(0, 640, torch.float32), expected)


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(tokens: int, dtype: torch.dtype, launch: Launch) -> None:
    matrix = opened(coded(100, 384, 0.3))
    resident = index_matrix(matrix, launch)
    assert resident.whole_rows
    exact = dense(matrix).double()
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 384, generator=generator).to(dtype)
    bias = torch.randn(100, generator=generator).to(dtype)
    close = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for first, end in ((0, 100), (3, 50), (99, 100)):
        expected = x.double() @ exact[first:end].T + bias[first:end].double()
        product = resident.multiply(x, first, end, 0, bias[first:end])
        assert product.dtype == dtype
        assert product.shape == (tokens, end - first)
        assert (product.double() - expected).abs().max() < close * expected.abs().max()
    # Columns 5 to 104 alone, and no bias.
    part = x[:, :100]
    expected = part.double() @ exact[:, 5:105].T
    error = resident.multiply(part, 0, 100, 5, None).double() - expected
    assert error.abs().max() < close * expected.abs().max()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_by_number(dtype: torch.dtype, launch: Launch) -> None:
    matrix = opened(coded(2000, 96))
    resident = index_matrix(matrix, launch)
    numbers = torch.tensor([1999, 0, 7, 7, 1234, 1, 999, 1000, 1001, 86])
    expected = dense(matrix, dtype)
    assert same_bits(resident.gather(numbers, 0, 2000, dtype), expected[numbers])
    part = numbers[2:4]
    assert same_bits(resident.gather(part, 100, 50, dtype), expected[100:150][part])
    assert resident.gather(numbers[:0], 0, 2000, dtype).shape == (0, 96)
    for outside in (2000, -1):
        with pytest.raises(AssertionError, match="__trap"):
            resident.gather(torch.tensor([3, outside]), 0, 2000, dtype)


@needs_compiler
def test_what_the_operators_ask_of_a_device(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way from the operators to the kernels, with the CPU in the device's place."""
    weight = coded(300, 384)[20:220, 7:107]
    matrix = opened(weight)
    resident = index_matrix(matrix, launch)
    monkeypatch.setattr(KERNELS, "resident", lambda matrix, device: resident)
    monkeypatch.setattr(KERNELS, "missing", lambda device: None)
    monkeypatch.setattr(KERNELS, "refusal", lambda matrix, window, device: None)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(choice, "capturing", lambda device: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    window, expected = Window(*weight.resolved_window), weight.dequantize()
    for dtype in (*DTYPES, torch.float64):
        found = choice.decode(matrix, window, dtype, device)
        assert found.is_contiguous()
        assert torch.equal(found, expected.to(dtype))
    x, bias = torch.randn(5, 100), torch.randn(200)
    product = KERNELS.multiply(matrix, window, x, bias)
    assert product is not None
    assert torch.allclose(product, F.linear(x, expected, bias), atol=1e-4)
    for other in (torch.randn(9, 100), torch.randn(0, 100), x.double()):
        assert KERNELS.multiply(matrix, window, other, None) is None
    for outside in (Window(0, 301, 0, 384), Window(0, 300, 1, 384)):
        with pytest.raises(ValueError, match="of a matrix of 300x384"):
            KERNELS.multiply(matrix, outside, x, None)


@needs_compiler
def test_zero_points_and_single_scales(launch: Launch) -> None:
    weight = coded(60, 96, 0.2)
    matrix = opened(weight)
    stored = matrix.stored()
    exact = dense(matrix)
    offset = np.linspace(-1, 1, 60, dtype=np.float32)
    outliers = {0: read_tile(stored.data, matrix.header, 0)[1]}
    places = exact_weights(matrix.header, outliers)[0].astype(np.uint64)
    assert len(places)
    shifted = dataclasses.replace(stored, zero_point=offset)
    resident = ResidentMatrix(
        shifted, tables_of_matrix(stored), places, np.full(len(places), 7, np.float32),
        weight.qdata, launch,
    )  # fmt: skip
    expected = exact + torch.from_numpy(offset)[:, None]
    expected.view(-1)[torch.from_numpy(places.astype(np.int64))] = 7
    assert same_bits(resident.decode(0, 60, torch.float32), expected)
    x = torch.randn(3, 96)
    assert torch.allclose(resident.multiply(x, 0, 60, 0, None), x @ expected.T, atol=1e-3)
    single = dataclasses.replace(
        stored,
        row_scale=np.array([2.0], np.float32),
        col_scale=np.array([0.5], np.float32),
    )
    none = np.empty(0, np.uint64), np.empty(0, np.float32)
    resident = ResidentMatrix(single, tables_of_matrix(stored), *none, weight.qdata, launch)
    z = resident.decode(0, 60, torch.float32)
    scaled = z * torch.from_numpy(stored.row_scale)[:, None] * torch.from_numpy(stored.col_scale)
    inside = torch.ones(60 * 96, dtype=torch.bool)
    inside[torch.from_numpy(places.astype(np.int64))] = False
    assert same_bits(scaled.view(-1)[inside], exact.view(-1)[inside])


@needs_compiler
def test_slices_hold_some_tiles_only(launch: Launch) -> None:
    weight = coded(512, 512)
    part = weight[200:300].contiguous()
    matrix = opened(part)
    first = weight.dequantize()[200:300]
    resident = index_matrix(matrix, launch)
    start = Window(*part.window).first_row
    assert same_bits(resident.decode(start, start + 100, torch.float32), first)
    x = torch.randn(1, 512)
    product = resident.multiply(x, start, start + 100, 0, None)
    assert torch.allclose(product, x @ first.T, atol=1e-3)


@needs_compiler
@pytest.mark.parametrize(("change", "message"), [(-2, "before its weights"), (2, "left over")])
def test_streams_that_do_not_fit(change: int, message: str, launch: Launch) -> None:
    weight = coded(512, 256)
    matrix = opened(weight)
    stored = matrix.stored()
    assert len(stored.payload_sizes) == 2
    sizes = stored.payload_sizes.copy()
    sizes[0] = int(sizes[0]) + change
    broken = dataclasses.replace(stored, payload_sizes=sizes)
    tables = tables_of_matrix(stored)
    none = np.empty(0, np.uint64), np.empty(0, np.float32)
    with pytest.raises(CodecError, match=f"tile 0 is corrupt: stream.*{message}"):
        ResidentMatrix(broken, tables, *none, weight.qdata, launch)


def test_heads_that_do_not_fit() -> None:
    stored = opened(coded(512, 256)).stored()
    none = np.empty(0, np.uint64)
    sizes = stored.payload_sizes.copy()
    sizes[1] = 131
    with pytest.raises(CodecError, match="tile 1 is corrupt: stream ends"):
        gpu.build_index(dataclasses.replace(stored, payload_sizes=sizes), none)
    data = bytearray(stored.data)
    offset = int(stored.offsets[1])
    data[offset : offset + 4] = (2049).to_bytes(4, "little")
    with pytest.raises(CodecError, match="tile 1 is corrupt: sizes"):
        gpu.build_index(dataclasses.replace(stored, data=memoryview(bytes(data))), none)


@needs_compiler
def test_damage_is_found_before_anything_is_decoded(launch: Launch) -> None:
    weight = coded(64, 576)
    damaged = weight.qdata.clone()
    damaged[len(damaged) // 2] ^= 16
    broken = open_matrix(damaged, weight.scale, weight.zero_point, weight.act_pre_scale)
    with pytest.raises(CodecError, match="tile 0 is corrupt"):
        index_matrix(broken, launch)


@pytest.mark.parametrize("rows", [576, 2048, 4096, 14336, 28672])
@pytest.mark.parametrize("cols", [576, 1000, 4096, 14336])
def test_segments_are_of_whole_rows_and_cheap(rows: int, cols: int) -> None:
    steps = gpu.segment_steps(rows * cols, cols)
    if cols % 32 == 0:
        assert steps % (cols // 32) == 0
    assert 184 * 8 / (steps * 32) <= 0.37  # bits per weight
    if rows * cols >= 4096 * 4096:
        assert rows * cols // 32 // steps >= 2000


@dataclasses.dataclass(frozen=True)
class Columns:
    """A matrix in a stream by columns, in an order of its own, with scales and zero points."""

    stored: StoredMatrix
    places: np.ndarray
    values: np.ndarray

    def index(self, launch: Launch) -> ResidentColumns:
        qdata = torch.frombuffer(bytearray(self.stored.data), dtype=torch.uint8)
        classes = decoder_classes_of_matrix(self.stored)
        return ResidentColumns(self.stored, classes, self.places, self.values, qdata, launch)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the CPU's decoder makes of it."""
        tiles = range(len(self.stored.offsets))
        return decoded_columns(self.stored, dtype, 0, tiles)


def by_columns(
    rows: int, cols: int, tiles: int = 1, step: float = 0.5, spread: float = 1.0
) -> Columns:
    """With outliers at its corners, and in many rows of two columns."""
    found = {(0, 0): 40.0, (0, cols // 2): -33.0, (rows - 1, cols - 1): -55.0}
    for row in range(0, rows, 3):
        found |= {(row, cols // 3): 20.0 + row, (row, 0): -9.0}
    outliers = sorted((r, c, v) for (r, c), v in found.items())
    order = np.random.default_rng(cols).permutation(cols).astype(np.uint32)
    z = cut(varied(rows, cols, spread), tiles)
    stored = stored_matrix(z, step, order=order, scales=True, outliers=outliers)
    return Columns(
        stored,
        np.array([r * cols + c for r, c, _ in outliers], np.uint64),
        np.array([v for _, _, v in outliers], np.float32),
    )


# Rows, columns, tiles; and of how many parts and groups segments are then.
COLUMNS = [
    ((200, 96, 1), (1, 1)),
    ((700, 40, 1), (2, 1)),  # trellis states inside of a group
    ((545, 64, 2), (1, 1)),
    ((300, 100, 3), (1, 3)),
    ((50, 77, 3), (1, 3)),
    ((9, 700, 9), (1, 22)),
    ((60, 150, 1), (1, 4)),  # a last segment of fewer groups
    ((1, 96, 1), (1, 3)),
    ((1, 33, 1), (1, 2)),
    ((5, 1, 1), (1, 1)),
]


@needs_compiler
@pytest.mark.parametrize(("shape", "division"), COLUMNS, ids=str)
def test_columns_are_those_of_the_cpu(
    shape: tuple[int, int, int], division: tuple[int, int], launch: Launch
) -> None:
    rows, cols, tiles = shape
    assert gpu_columns.division(-(-rows // tiles), groups_of(cols), rows * cols) == division
    matrix = by_columns(*shape)
    resident = matrix.index(launch)
    for dtype in DTYPES:
        expected = matrix.dense(dtype)
        assert same_bits(resident.decode(0, rows, dtype), expected)
        for first in {0, rows // 3, rows - 1}:
            end = min(first + 5, rows)
            assert same_bits(resident.decode(first, end, dtype), expected[first:end])


@needs_compiler
@pytest.mark.parametrize(("step", "spread", "classes"), [(0.5, 0, 1), (0.2, 2.5, 8), (2.0, 1, 3)])
def test_classes_of_columns(step: float, spread: float, classes: int, launch: Launch) -> None:
    matrix = by_columns(150, 480, step=step, spread=spread)
    found = len(ColumnModel.from_bytes(matrix.stored.private, 480).classes)
    assert found == 1 if classes == 1 else found >= classes
    resident = matrix.index(launch)
    expected = matrix.dense()
    assert same_bits(resident.decode(0, 150, torch.float32), expected)
    x = torch.randn(2, 480, generator=torch.Generator().manual_seed(0))
    product = resident.multiply(x, 0, 150, 0, None)
    assert torch.allclose(product, x @ expected.T, rtol=1e-5, atol=1e-3)


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_by_columns(tokens: int, dtype: torch.dtype, launch: Launch) -> None:
    close = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    generator = torch.Generator().manual_seed(tokens)
    for shape in ((110, 77, 2), (601, 40, 1)):
        matrix = by_columns(*shape)
        rows, cols, _ = shape
        resident, exact = matrix.index(launch), matrix.dense().double()
        x = torch.randn(tokens, cols, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator).to(dtype)
        for first, end in ((0, rows), (3, rows // 2), (rows - 1, rows)):
            expected = x.double() @ exact[first:end].T + bias[first:end].double()
            product = resident.multiply(x, first, end, 0, bias[first:end])
            assert product.dtype == dtype
            assert product.shape == (tokens, end - first)
            assert (product.double() - expected).abs().max() < close * expected.abs().max()
        # Columns 5 to 34 alone, and no bias.
        part = x[:, :30]
        expected = part.double() @ exact[:, 5:35].T
        error = resident.multiply(part, 0, rows, 5, None).double() - expected
        assert error.abs().max() < close * expected.abs().max()


@needs_compiler
@pytest.mark.parametrize("shape", [(700, 200, 1), (300, 320, 4), (700, 160, 10)], ids=str)
def test_products_by_columns_are_always_the_same(
    shape: tuple[int, int, int], library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = by_columns(*shape)
    x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(0))
    expected = x.double() @ matrix.dense().double().T
    for sums in (2**22, 3 * shape[0] * 2, 1):  # of a set, of two chunks, of all columns
        monkeypatch.setattr(gpu_columns, "_SUMS", sums)
        first = None
        for seed in range(3):
            resident = matrix.index(host_launch(library, seed))
            assert same_bits(resident.decode(0, shape[0], torch.float32), matrix.dense())
            product = resident.multiply(x, 0, shape[0], 0, None)
            assert (product.double() - expected).abs().max() < 2e-6 * expected.abs().max()
            assert first is None or same_bits(product, first)
            first = product


@needs_compiler
def test_columns_in_the_order_of_the_matrix(launch: Launch) -> None:
    matrix = by_columns(300, 100, 2)
    one = np.full(1, 0.75, np.float32)
    stored = dataclasses.replace(
        matrix.stored, column_order=None, row_scale=one, col_scale=2 * one, zero_point=None
    )
    matrix = dataclasses.replace(matrix, stored=stored)
    resident, expected = matrix.index(launch), matrix.dense()
    assert same_bits(resident.decode(0, 300, torch.float32), expected)
    x = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    product = resident.multiply(x, 0, 300, 0, None)
    assert torch.allclose(product, x @ expected.T, rtol=1e-5, atol=1e-3)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_important_weights(dtype: torch.dtype, launch: Launch) -> None:
    """Files that calibration makes: columns sorted by their scales, one scale for each."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(400, 1024, generator=generator)
    weight[::50, ::90] *= 40
    config = codec_weight_only("ectcq", bits=2.5, preset="fast")
    tensor = CodecTensor.from_hp(weight.to(dtype), config.with_importance(important(weight), 2.5))
    matrix = opened(tensor)
    assert is_by_columns(matrix.header.private)
    assert matrix.column_order is not None
    assert len(matrix.header.blocks) > 1
    resident = index_matrix(matrix, launch)
    assert isinstance(resident, ResidentColumns)
    expected = dense(matrix, dtype)
    assert same_bits(resident.decode(0, 400, dtype), expected)
    x = torch.randn(5, 1024, generator=generator)
    exact = dense(matrix).double()
    product = resident.multiply(x, 0, 400, 0, None).double() - x.double() @ exact.T
    assert product.abs().max() < 2e-6 * (x.double() @ exact.T).abs().max()
    slice_ = tensor[300:390].contiguous()  # some tiles only
    part, start = opened(slice_), Window(*slice_.window).first_row
    resident = index_matrix(part, launch)
    assert same_bits(resident.decode(start, start + 90, dtype), expected[300:390])
    with pytest.raises(CodecError, match="tile 0 is not here"):
        KERNELS.decode(part, Window(0, 400, 0, 1024), dtype, torch.device("cuda", 0))


@needs_compiler
def test_what_the_operators_ask_of_columns(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(300, 384, generator=torch.Generator().manual_seed(0))
    config = codec_weight_only("ectcq", bits=3, preset="fast")
    tensor = CodecTensor.from_hp(weight, config.with_importance(important(weight), 3))[
        20:220, 7:107
    ]
    matrix = opened(tensor)
    device = torch.device("cuda", 0)
    window, expected = Window(*tensor.resolved_window), tensor.dequantize()
    # No index is made for rows by number, and none is asked of a device here.
    assert KERNELS.rows(matrix, window, torch.tensor([0]), torch.float32) is None
    assert "on cpu" in str(KERNELS.refusal(matrix, window, device))
    assert KERNELS.refusal(matrix, window, torch.device("cpu")) is None
    resident = index_matrix(matrix, launch)
    monkeypatch.setattr(KERNELS, "resident", lambda matrix, device: resident)
    for dtype in (*DTYPES, torch.float64):
        found = KERNELS.decode(matrix, window, dtype, device)
        assert found.is_contiguous()
        assert torch.equal(found, expected.to(dtype))
    x, bias = torch.randn(5, 100), torch.randn(200)
    product = KERNELS.multiply(matrix, window, x, bias)
    assert product is not None
    assert torch.allclose(product, F.linear(x, expected, bias), atol=1e-4)
    for outside in (Window(0, 301, 0, 384), Window(0, 300, 1, 384)):
        with pytest.raises(ValueError, match="of a matrix of 300x384"):
            KERNELS.multiply(matrix, outside, x, None)


@needs_compiler
@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize(("change", "message"), [(-2, "before its weights"), (2, "left over")])
def test_streams_by_columns_that_do_not_fit(
    change: int, message: str, tile: int, launch: Launch
) -> None:
    matrix = by_columns(120, 64, 2)
    sizes = matrix.stored.payload_sizes.copy()
    sizes[tile] = int(sizes[tile]) + change
    data = memoryview(bytes(matrix.stored.data) + bytes(2))
    broken = dataclasses.replace(matrix.stored, payload_sizes=sizes, data=data)
    with pytest.raises(CodecError, match=f"tile {tile} is corrupt: stream.*{message}"):
        dataclasses.replace(matrix, stored=broken).index(launch)


def test_heads_of_columns_that_do_not_fit() -> None:
    stored = by_columns(120, 64, 2).stored
    sizes = stored.payload_sizes.copy()
    sizes[1] = 131
    with pytest.raises(CodecError, match="tile 1 is corrupt: stream ends"):
        gpu_columns.build_tiles(dataclasses.replace(stored, payload_sizes=sizes))
    data = bytearray(stored.data)
    offset = int(stored.offsets[1])
    for tail, fits in ((120, True), (121, False)):  # 60 rows of two groups
        data[offset : offset + 4] = tail.to_bytes(4, "little")
        changed = dataclasses.replace(stored, data=memoryview(bytes(data)))
        if fits:
            assert gpu_columns.build_tiles(changed)["reading"][1] == 0
            continue
        with pytest.raises(CodecError, match="tile 1 is corrupt: sizes"):
            gpu_columns.build_tiles(changed)
    high = (2**31 - 1) // 64 - 8
    assert len(gpu_columns.build_tiles(dataclasses.replace(stored, rows=2 * high))) == 2
    with pytest.raises(CodecError, match="tile 1 is corrupt: sizes"):
        gpu_columns.build_tiles(dataclasses.replace(stored, rows=2 * high + 1))
    with pytest.raises(CodecError, match="tiles differ in their step"):
        decoder_classes_of_matrix(
            dataclasses.replace(stored, units=stored.units * np.array([1, 2], np.float32))
        )
    classes = decoder_classes_of_matrix(stored)
    frequency = np.frombuffer(classes.classes[0].frequency, np.uint16).reshape(2, -1)
    before = frequency.copy()
    try:
        frequency[1] = 0
        frequency[1, 5] = 4096
        with pytest.raises(CodecError, match="tables of a stream do not fit"):
            gpu_columns.class_tables(classes)
    finally:
        frequency[:] = before
    made = gpu_columns.class_tables(classes)["runs"][0].reshape(2, -1)
    assert ((made >> 16).sum(1) == 4096).all()


@pytest.mark.parametrize("rows", [576, 2048, 4096, 14336, 28672])
@pytest.mark.parametrize("cols", [576, 1000, 4096, 14336])
def test_segments_of_columns_are_cheap(rows: int, cols: int) -> None:
    tiles = -(-rows * cols // ECTCQ().weights_per_column_tile(cols))
    height, groups = -(-rows // tiles), groups_of(cols)
    parts, set_groups = gpu_columns.division(height, groups, rows * cols)
    segments = tiles * parts * -(-groups // set_groups)
    kept = 4 + 4 + 128 + (32 if parts > 1 else 0)
    assert (segments * kept + 32 * tiles) * 8 / (rows * cols) <= 0.2
    if rows * cols >= 4096 * 4096:
        assert segments >= 1500


@needs_compiler
def test_columns_are_multiplied_where_tensor_cores_have_tf32(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = by_columns(5, 1).index(launch)
    assert resident.multiplies
    monkeypatch.setattr(resident, "_device", torch.device("cuda", 0))
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert resident.multiplies == expected


@needs_compiler
def test_index_of_columns_takes_what_it_says(launch: Launch) -> None:
    resident = by_columns(700, 40).index(launch)
    assert resident.segments == 4
    assert resident.index_bytes == 32 + 4 * (4 + 128 + 32) + 4 * 5


SANITIZED = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
from test_gpu_kernels import (
    COLUMNS, SHAPES, by_columns, coded, dense, host_launch, opened, same_bits,
)
from torchcodec_weights.codecs.ectcq.resident import index_matrix
for shape in SHAPES:
    matrix = opened(coded(*shape))
    resident = index_matrix(matrix, host_launch(Path(sys.argv[1])))
    assert same_bits(resident.decode(0, shape[0], torch.bfloat16), dense(matrix, torch.bfloat16))
    resident.decode(shape[0] // 2, shape[0], torch.float32)
    if resident.whole_rows:
        resident.multiply(torch.randn(3, shape[1]), 0, shape[0], 0, torch.randn(shape[0]))
        resident.multiply(torch.randn(1, 7), shape[0] // 2, shape[0], 9, None)
        resident.gather(torch.tensor([0, shape[0] - 1]), 0, shape[0], torch.float16)
for shape, _ in COLUMNS:
    matrix = by_columns(*shape)
    resident, rows = matrix.index(host_launch(Path(sys.argv[1]))), shape[0]
    assert same_bits(resident.decode(0, rows, torch.bfloat16), matrix.dense(torch.bfloat16))
    resident.decode(rows // 2, rows, torch.float32)
    resident.multiply(torch.randn(3, shape[1]), 0, rows, 0, torch.randn(rows))
    resident.multiply(torch.randn(1, 1), rows // 2, rows, shape[1] - 1, None)
print("nothing found")
"""


@needs_compiler
def test_no_byte_is_touched_that_is_not_the_matrix(tmp_path: Path) -> None:
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    library = build(tmp_path / "sanitized.so", *flags)
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(run.stdout.strip() for run in runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [sys.executable, "-c", SANITIZED, str(library), str(HERE)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "nothing found" in run.stdout


@pytest.mark.skipif(nvrtc.missing() is not None, reason="needs NVRTC")
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120"])
def test_nvrtc_compiles_the_kernels(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = cubins.kernel_names(cubins.compile_source(gpu.SOURCE.read_text(), architecture))
    assert len(set(names)) == len(names)
    for kernel in (
        "index",
        "scale",
        "decode_bfloat16",
        "multiply_1",
        "multiply_8",
        "columns_index",
        "columns_sum",
        "columns_decode_bfloat16",
        "columns_multiply",
    ):
        assert f"ectcq_{kernel}" in names


def test_without_a_gpu_the_cpu_decodes() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cuda.missing() is not None
    matrix = opened(coded(64, 576))
    window = Window(0, 64, 0, 576)
    assert choice._offered(matrix.codec, torch.device("cpu")) == []
    assert choice._offered(matrix.codec, torch.device("cuda", 0)) == [KERNELS]
    with pytest.raises(ValueError, match="decoder='nvdec'"):
        use_decoder("ectcq", "nvdec")
    with use_decoder("ectcq", "cuda"):
        device = torch.device("cuda", 0)
        assert KERNELS.missing(device) == cuda.missing()
        with pytest.raises(
            CodecUnavailableError, match=r"decoded by ectcq \(CUDA kernels\) on cuda"
        ):
            choice._first(matrix, window, device, "decode", lambda decoder: torch.empty(0))
