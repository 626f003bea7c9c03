"""Weights as int8 levels: the kernels of all instruction sets, and what levels lose."""

import itertools

import numpy as np
import pytest
import test_order
import torch
from conftest import coded, snr_db
from torch import Tensor

from torchcodec_weights import CodecError, CodecTensor, codec_weight_only
from torchcodec_weights.codecs.common import compiled, int8
from torchcodec_weights.decoders import int8 as decoders_int8
from torchcodec_weights.decoders.int8 import Int8Weight, int8_weight
from torchcodec_weights.format.dtypes import dtype_name
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.dtypes import FLOAT_DTYPES
from torchcodec_weights.matrix.opened import open_matrix

LEVELS = range(compiled.best_level() + 1)


def opened(weight: CodecTensor) -> Int8Weight:
    return int8_weight(open_matrix(*weight.coded), Window(*weight.resolved_window))


def made(rows: int, cols: int, *, scaled: bool, exact: bool) -> Int8Weight:
    """Random levels and scales."""
    draw = torch.Generator().manual_seed(rows * cols)
    count = rows * cols
    flat = torch.randint(-127, 128, (count + int8.PADDING,), dtype=torch.int8, generator=draw)
    places = torch.randint(0, 3 if exact else 1, (rows,), generator=draw)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), places.cumsum(0)]).to(torch.int32)
    found = int(starts[-1])
    return Int8Weight(
        Window(0, rows, 0, cols),
        flat[:count].view(rows, cols),
        torch.randn(rows, generator=draw),
        torch.randn(cols, generator=draw) if scaled else None,
        torch.randn(rows, generator=draw) if scaled else None,
        starts,
        torch.randint(0, cols, (found,), dtype=torch.int32, generator=draw),
        100 * torch.randn(found, generator=draw),
        0,
        40.0,
    )


def dense(weight: Int8Weight) -> Tensor:
    """The weights by the formula, in float64."""
    levels = weight.levels.double()
    starts = weight.exact_starts.tolist()
    for row, (first, end) in enumerate(itertools.pairwise(starts)):
        for k in range(first, end):
            column = int(weight.exact_columns[k]) - weight.first_col
            if 0 <= column < weight.window.cols:
                levels[row, column] += weight.exact_values[k].double()
    levels *= weight.row_scale[:, None].double()
    if weight.col_scale is not None:
        levels *= weight.col_scale.double()
    if weight.zero_point is not None:
        levels += weight.zero_point[:, None].double()
    return levels


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: compiled.LEVELS[level])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 5), (9, 16), (40, 67), (130, 300)])
@pytest.mark.parametrize("full", [True, False], ids=["scales", "levels"])
def test_kernels(level: int, dtype: torch.dtype, rows: int, cols: int, full: bool) -> None:
    weight = made(rows, cols, scaled=full, exact=full)
    expected = dense(weight)
    for tokens in (1, 2, 3, 7, 64):
        for threads in (1, 3):
            x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(1)).to(dtype)
            bias = torch.randn(rows).to(dtype) if full else None
            out = torch.full((tokens, rows), torch.nan, dtype=dtype)
            int8.multiply(
                weight._view, x.data_ptr(), tokens, None if bias is None else bias.data_ptr(),
                out.data_ptr(), dtype_name(dtype), threads, level,
            )  # fmt: skip
            product = x.double() @ expected.T + (0 if bias is None else bias.double())
            terms = x.double().abs() @ expected.abs().T
            if weight.zero_point is not None:
                # Their part is the sum of x, which may cancel the rest.
                terms += 2 * x.double().abs().sum(1, keepdim=True) * weight.zero_point.abs()
            allowed = 4e-6 * terms + torch.finfo(dtype).eps * product.abs() + 1e-6
            assert bool(((out.double() - product).abs() <= allowed).all())


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: compiled.LEVELS[level])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_rows(level: int, dtype: torch.dtype) -> None:
    """The formula in float32, each operation rounded, the same bits for all instruction sets."""
    weight = made(50, 67, scaled=True, exact=False)
    assert weight.col_scale is not None
    assert weight.zero_point is not None
    whole = weight.levels.float() * weight.row_scale[:, None] * weight.col_scale
    whole += weight.zero_point[:, None]
    indices = torch.tensor([49, 0, 7, 7])
    for wanted, expected in ((indices, whole[indices]), (None, whole)):
        out = torch.empty(expected.shape, dtype=dtype)
        place = None if wanted is None else wanted.data_ptr()
        int8.rows(weight._view, place, len(out), out.data_ptr(), dtype_name(dtype), 2, level)
        assert torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 64, 65, 200])
def test_any_number_of_tokens(dtype: torch.dtype, tokens: int) -> None:
    weight = made(300, 96, scaled=True, exact=True)
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(2, tokens, 96, generator=draw).to(dtype)[1]
    bias = torch.randn(300, generator=draw)
    product = weight.multiply(x, bias)
    assert product is not None
    assert product.dtype == dtype
    # From 17 tokens on, bfloat16 multiplies by weights rounded to bfloat16, as dense weights are.
    expected = x.double() @ dense(weight).T + bias
    scale = float(expected.square().mean().sqrt()) if tokens else 1.0
    torch.testing.assert_close(
        product.double(), expected, rtol=0, atol=40 * torch.finfo(dtype).eps * scale
    )


def test_dtypes_that_weights_do_not_have() -> None:
    weight = made(3, 5, scaled=False, exact=False)
    assert weight.multiply(torch.ones(1, 5, dtype=torch.float64), None) is None
    assert weight.decoded(torch.float64) is None
    assert weight.rows(torch.tensor([0]), torch.float64) is None


def test_parts_share_memory() -> None:
    weight = made(40, 67, scaled=True, exact=True)
    part = weight.part(Window(7, 20, 3, 61)).part(Window(9, 11, 20, 40))
    assert part.levels.data_ptr() == weight.levels[9, 20:].data_ptr()
    decoded = part.decoded(torch.float32)
    whole = weight.decoded(torch.float32)
    assert decoded is not None
    assert whole is not None
    assert torch.equal(decoded, whole[9:20, 20:60])
    assert torch.allclose(decoded.double(), dense(part), rtol=1e-5, atol=1e-4)
    x = torch.randn(3, 40)
    product = part.multiply(x, None)
    assert product is not None
    torch.testing.assert_close(product, x @ whole[9:20, 20:60].T, rtol=1e-4, atol=1e-2)
    with pytest.raises(IndexError, match="indices from 11 to 11 into a weight of 11 rows"):
        part.rows(torch.tensor([11]), torch.float32)


# Five root mean squares of a row in 127 steps, and an error of a twelfth of a step squared.
LEAST_DB = 10 * np.log10(12 * 127**2 / 5**2)


def check(weight: CodecTensor, least_db: float = LEAST_DB - 0.1) -> Int8Weight:
    """Levels are within half a step of the decoded weights, and their error is as told."""
    found = opened(weight)
    exact = weight.dequantize(torch.float32)
    ours = found.decoded(torch.float32)
    assert ours is not None
    step = found.row_scale[:, None] * torch.ones_like(exact)
    if found.col_scale is not None:
        step *= found.col_scale
    rounding = 4e-7 * (exact.abs() + step.abs() * 127)
    assert bool(((ours - exact).abs() <= 0.5 * step.abs() + rounding).all())
    assert snr_db(exact, ours) == pytest.approx(found.snr_db, abs=0.05)
    assert found.snr_db > least_db
    return found


def test_levels_of_a_real_weight(query: Tensor) -> None:
    weight = coded(query, "ectcq")
    found = check(weight)
    assert found.col_scale is None or len(found.col_scale) == 384
    assert found.nbytes < 1.05 * query.numel()


def test_weights_far_out_do_not_make_the_step_larger(spiky: Tensor) -> None:
    weight = coded(spiky, "ectcq")
    found = check(weight)
    assert found.col_scale is not None
    z = weight.dequantize() / found.col_scale
    deviations = z.abs().median(1).values / 0.6745
    assert float((z.abs().amax(1) / deviations).max()) > 30
    assert bool((127 * found.row_scale < 8 * deviations).all())
    assert 0 < len(found.exact_values) < 0.002 * spiky.numel()


@pytest.mark.parametrize("codec", ["lossless", "h264", "jpeg2000"])
def test_levels_of_other_codecs(codec: str, query: Tensor) -> None:
    config = codec_weight_only(codec) if codec == "lossless" else codec_weight_only(codec, bits=3)
    check(CodecTensor.from_hp(query + 0.1 * query.std(1, keepdim=True), config))


@pytest.mark.parametrize("codec", ["ectcq", "h264"])
def test_levels_of_sorted_rows_and_columns(codec: str, query: Tensor) -> None:
    """Format 3: scales follow importance, and the bitstream has another order."""
    weight = test_order.coded(query, codec)
    found = check(weight, weight.header.snr_db + 20)
    assert found.col_scale is not None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_odd_weights(dtype: torch.dtype) -> None:
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    w[3] = 0
    w[4] = 2.0
    w[5] *= 1e-6
    w[6] *= 1e3
    w[7, 1:] = 0
    weight = CodecTensor.from_hp(w.to(dtype), codec_weight_only("lossless"))
    found = check(weight)
    assert torch.equal(dense(found)[3], torch.zeros(64, dtype=torch.float64))
    nothing = CodecTensor.from_hp(torch.zeros(40, 40), codec_weight_only("lossless"))
    zeros = opened(nothing)
    assert zeros.snr_db == np.inf
    assert torch.equal(zeros.decoded(torch.float32), torch.zeros(40, 40))
    tiny = CodecTensor.from_hp(torch.full((40, 40), 1e-42), codec_weight_only("lossless"))
    kept = opened(tiny).decoded(torch.float32)
    assert kept is not None
    assert bool(kept.isfinite().all())


@pytest.mark.parametrize("shape", [None, [100, 200]], ids=["rows", "blocks"])
@pytest.mark.parametrize("group", [1, 2**17, 2**30])
def test_windows_and_groups_of_tiles(
    shape: list[int] | None, group: int, spiky: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders_int8, "_GROUP", group)
    weight = coded(spiky, "ectcq", tile_shape=shape)
    assert len(weight.header.tiles) > 1
    check(weight)
    check(weight[50:250])
    check(weight[50:150].contiguous())
    check(weight[:, 100:300])


def test_a_corrupt_tile(query: Tensor) -> None:
    weight = coded(query, "ectcq")
    weight.qdata[-20] ^= 255
    with pytest.raises(CodecError, match="corrupt"):
        opened(weight)
