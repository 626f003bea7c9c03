"""ECTCQ: all kernels against the reference decoder, the trellis, the entropy model, bad bytes."""

from itertools import pairwise

import google_crc32c
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import snr_db
from ectcq_reference import POLYNOMIALS
from ectcq_reference import decode as reference_decode
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchcodec_weights import CodecError, CodecTensor, codec_weight_only
from torchcodec_weights.codecs.common import compiled
from torchcodec_weights.codecs.common.compiled import matrix_view
from torchcodec_weights.codecs.ectcq import ECTCQ, kernels
from torchcodec_weights.codecs.ectcq.model import EntropyModel, tables_of, tables_of_matrix, train
from torchcodec_weights.codecs.records import EncoderSettings, StoredMatrix
from torchcodec_weights.decoders import cpu
from torchcodec_weights.format.container import Outliers, pack_outliers

HERE = range(compiled.best_level() + 1)


def code(tile: np.ndarray, step: float, preset: str) -> tuple[bytes, bytes, float]:
    codec, chosen = ECTCQ(), EncoderSettings(preset)
    private = codec.prepare([tile], step, chosen)
    coded = codec.encode(tile, step, float(np.abs(tile).max()), private, chosen)
    return coded.payload, private, coded.unit


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 90),
    step=st.sampled_from([0.05, 0.3, 0.55, 1.2]),
    preset=st.sampled_from(["fast", "medium", "best"]),
    seed=st.integers(0, 99),
)
def test_every_kernel_agrees_with_the_reference(
    rows: int, cols: int, step: float, preset: str, seed: int
) -> None:
    tile = np.random.default_rng(seed).standard_normal((rows, cols), np.float32)
    payload, private, unit = code(tile, step, preset)
    expected = reference_decode(payload, private, unit, tile.size).reshape(tile.shape)
    for level in HERE:
        out = np.empty_like(tile)
        kernels.decode(tables_of(private, unit), payload, out, level)
        assert (out == expected).all(), compiled.LEVELS[level]


def stored(
    parts: list[np.ndarray], private: bytes, step: float, sections: list[bytes]
) -> StoredMatrix:
    """Encode tiles, with outlier sections, scales and zero points."""
    peak = max(float(np.abs(part).max()) for part in parts)
    fast = EncoderSettings("fast")
    coded = [ECTCQ().encode(part, step, peak, private, fast) for part in parts]
    data = [tile.payload + own for tile, own in zip(coded, sections, strict=True)]
    sizes = np.array([len(one) for one in data], np.uint64)
    rows, cols = sum(map(len, parts)), parts[0].shape[1]
    rng = np.random.default_rng(len(parts))
    return StoredMatrix(
        data=memoryview(b"".join(data)),
        offsets=np.cumsum(sizes) - sizes,
        payload_sizes=np.array([len(tile.payload) for tile in coded], np.uint32),
        outlier_sizes=np.array([len(own) for own in sections], np.uint32),
        crcs=np.array([google_crc32c.value(one) for one in data], np.uint32),
        units=np.array([tile.unit for tile in coded], np.float32),
        rows=rows,
        cols=cols,
        row_scale=rng.uniform(0.5, 2, rows).astype(np.float32),
        col_scale=rng.uniform(0.5, 2, cols).astype(np.float32),
        zero_point=rng.uniform(-1, 1, rows).astype(np.float32),
        dtype="float32",
        private=private,
        column_order=None,
    )


STORED_BY_TILE = ("offsets", "payload_sizes", "outlier_sizes", "crcs", "units")


def tiled(tiles: int, cols: int, step: float) -> StoredMatrix:
    """A matrix with three outliers, its tiles' heights unequal."""
    rows = 13 * tiles + tiles // 2
    z = np.random.default_rng(tiles).standard_normal((rows, cols), np.float32)
    bounds = [i * rows // tiles for i in range(tiles + 1)]
    parts = [z[a:b] for a, b in pairwise(bounds)]
    private = ECTCQ().prepare(parts, step, EncoderSettings("fast"))
    outliers = Outliers(np.array([0, 3, cols * 12 + 1]), np.float32([9, -7, 8]).view(np.uint8))
    sections = [pack_outliers(outliers) if i == tiles // 2 else b"" for i in range(tiles)]
    return stored(parts, private, step, sections)


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 7, 11])
@pytest.mark.parametrize("step", [0.6, 0.24, 0.12, 0.06])
@pytest.mark.parametrize("cols", [32, 331])
def test_tiles_decoded_together_are_those_of_the_scalar_decoder(
    tiles: int, step: float, cols: int
) -> None:
    """In one thread, so that several are; levels are few and many."""
    matrix = tiled(tiles, cols, step)
    tables, view = tables_of_matrix(matrix), matrix_view(matrix, range(tiles))
    expected = torch.full((matrix.rows, cols), torch.nan)
    kernels.decode_matrix(tables, view, expected.data_ptr(), "float32", 1, 0)
    x = np.random.default_rng(2).standard_normal((3, cols)).astype(np.float32)
    assert matrix.zero_point is not None
    plain = (expected.numpy() - matrix.zero_point[:, None]) / matrix.col_scale
    for level in HERE:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            out = torch.full(expected.shape, torch.nan, dtype=dtype)
            name = str(dtype).removeprefix("torch.")
            kernels.decode_matrix(tables, view, out.data_ptr(), name, 1, level)
            assert torch.equal(out, expected.to(dtype)), compiled.LEVELS[level]
        for tokens in (1, 3):
            y = np.full((tokens, matrix.rows), np.nan, np.float32)
            kernels.multiply_matrix(tables, view, x[:tokens], y, 1, level)
            assert np.abs(y - x[:tokens].astype(np.float64) @ plain.T).max() < 2e-4


@pytest.mark.parametrize("cols", [4096, 4127])
def test_matrices_larger_than_caches(cols: int) -> None:
    """They are written past the caches, where rows begin at a cache line."""
    z = np.random.default_rng(cols).standard_normal((64, cols), np.float32)
    private = ECTCQ().prepare([z], 0.5, EncoderSettings("fast"))
    outliers = Outliers(np.array([0, cols * 3 + 17]), np.float32([9, -7]).view(np.uint8))
    one = stored([z], private, 0.5, [pack_outliers(outliers)])
    tiles = 66  # all the same: 2^25 bytes of bfloat16 and more
    several = {name: np.repeat(getattr(one, name), tiles) for name in STORED_BY_TILE}
    rows = {name: np.tile(getattr(one, name), tiles) for name in ("row_scale", "zero_point")}
    matrix = StoredMatrix(**{**vars(one), **several, **rows, "rows": 64 * tiles})
    tables, view = tables_of_matrix(matrix), matrix_view(matrix, range(tiles))
    expected = torch.empty(64, cols)
    kernels.decode_matrix(tables, matrix_view(one, range(1)), expected.data_ptr(), "float32", 1, 0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        out = torch.full((tiles, 64, cols), torch.nan, dtype=dtype)
        assert out.nbytes >= 2**25
        name = str(dtype).removeprefix("torch.")
        kernels.decode_matrix(tables, view, out.data_ptr(), name, 2)
        assert (out == expected.to(dtype)).all()


@pytest.mark.parametrize("rows", [1, 40, 41, 43])
def test_checksums_cover_every_byte(rows: int) -> None:
    """Those of long tiles are computed in parts; the sums compared with are of another library."""
    codec, fast = ECTCQ(), EncoderSettings("fast")
    tile = np.random.default_rng(rows).standard_normal((rows, 333), np.float32)
    good = stored([tile], codec.prepare([tile], 0.1, fast), 0.1, [b""])
    tables = tables_of_matrix(good)
    assert (len(good.data) > 2 * 3 * 512) == (rows > 1)
    out = np.empty(tile.shape, np.float32)
    kernels.decode_matrix(tables, matrix_view(good, range(1)), out.ctypes.data, "float32", 1)
    for position in range(0, len(good.data), 7):
        data = bytearray(good.data)
        data[position] ^= 1 << position % 8
        matrix = StoredMatrix(**{**vars(good), "data": memoryview(bytes(data))})
        view = matrix_view(matrix, range(1))
        with pytest.raises(CodecError, match="tile 0 is corrupt: checksum"):
            kernels.decode_matrix(tables, view, out.ctypes.data, "float32", 1)


@pytest.mark.parametrize("tiles", [2, 3, 4])
def test_a_damaged_tile_is_found_among_those_decoded_with_it(tiles: int) -> None:
    """By every level, with the same message, or the same weights where nothing is amiss."""
    good, rng = tiled(tiles, 75, 0.55), np.random.default_rng(0)
    told: set[str] = set()
    for _ in range(60):
        tile = int(rng.integers(tiles))
        begin, size = int(good.offsets[tile]), int(good.payload_sizes[tile])
        data = bytearray(good.data)
        for at in rng.integers(0, size, int(rng.integers(1, 4))):
            data[begin + int(at)] ^= int(rng.integers(1, 256))
        crcs = good.crcs.copy()
        crcs[tile] = google_crc32c.value(
            bytes(data[begin : begin + size + int(good.outlier_sizes[tile])])
        )
        matrix = StoredMatrix(**{**vars(good), "data": memoryview(bytes(data)), "crcs": crcs})
        tables, view = tables_of_matrix(matrix), matrix_view(matrix, range(tiles))
        results: list[bytes | str] = []
        for level in HERE:
            out = np.zeros((matrix.rows, matrix.cols), np.float32)
            try:
                kernels.decode_matrix(tables, view, out.ctypes.data, "float32", 1, level)
            except CodecError as error:
                results.append(str(error))
            else:
                results.append(out.tobytes())
        assert all(result == results[0] for result in results)
        if isinstance(results[0], str):
            assert f"tile {tile} is corrupt" in results[0]
            told.add(results[0])
    assert len(told) > tiles


@pytest.mark.parametrize("preset", ["fast", "medium", "best"])
@pytest.mark.parametrize("step", [0.1, 0.55, 1.1])
def test_distance_to_the_rate_distortion_function(preset: str, step: float) -> None:
    tile = np.random.default_rng(0).standard_normal((64, 1024), np.float32)
    payload, private, unit = code(tile, step, preset)
    out = np.empty_like(tile)
    ECTCQ().decode(payload, unit, private, tile.shape, out)
    rate = 8 * len(payload) / tile.size
    gap = 6.0206 * rate + 10 * np.log10(np.mean((out - tile) ** 2) / np.mean(tile**2))
    assert 0 < gap < {"fast": 0.58, "medium": 0.42, "best": 0.34}[preset]


@pytest.mark.parametrize("preset", ["fast", "medium", "best"])
def test_searches_find_paths_of_equal_cost(preset: str) -> None:
    """Instruction sets may break ties differently, no more."""
    tile = np.random.default_rng(3).standard_normal(8192).astype(np.float32)
    model = train(tile, 0.5, 6.0, ECTCQ._STATES[preset])
    searched, kept = model.search_model(0.5, 6.0)
    lines = np.frombuffer(searched.line, np.float32).reshape(2, 256, 2).astype(np.float64)
    costs = []
    for level in HERE:
        path = kernels.search(searched, tile, level)
        line = lines[path >> 8, path & 255]
        costs.append(float((line[:, 0] - tile * line[:, 1]).sum()))
    assert kept.size
    assert costs == pytest.approx([costs[0]] * len(costs), rel=1e-6)


def test_the_trellises_are_those_of_the_format() -> None:
    assert kernels.trellises() == POLYNOMIALS


def test_paths_are_paths_of_the_trellis() -> None:
    tile = np.random.default_rng(3).standard_normal(32 * 64).astype(np.float32)
    for states, (h0, h1) in kernels.trellises().items():
        searched, _kept = train(tile, 0.6, 6.0, states).search_model(0.6, 6.0)
        path = kernels.search(searched, tile).reshape(64, 32)
        for lane in path.T:
            state = 0
            for step in lane:
                assert step >> 8 == state & 1
                state = state >> 1 ^ (h0 >> 1) * (state & 1) ^ (h1 >> 1) * (int(step) & 1)


def test_the_search_beats_every_neighbouring_path() -> None:
    """With 8 states and 6 steps, all paths can be tried."""
    rng = np.random.default_rng(5)
    model = train(rng.standard_normal(4096).astype(np.float32), 0.7, 4.0, 8)
    searched, kept = model.search_model(0.7, 4.0)
    line = np.frombuffer(searched.line, np.float32).reshape(2, 256, 2)
    h0, h1 = kernels.trellises()[8]
    z = np.zeros(32 * 6, np.float32)
    z[::32] = rng.standard_normal(6)
    found = kernels.search(searched, z)[::32]
    values = z[::32]
    cells = ((values + 4.0) * 16 / 0.7).astype(int)

    def cost(q: int, parity: int, t: int) -> float:
        a, b = line[q, kept[2 * q + parity, cells[t]]]
        return float(a - values[t] * b)

    totals = []
    for bits in range(2**6):
        state, total = 0, 0.0
        for t in range(6):
            parity = bits >> t & 1
            total += cost(state & 1, parity, t)
            state = state >> 1 ^ (h0 >> 1) * (state & 1) ^ (h1 >> 1) * parity
        totals.append(total)
    ours = sum(cost(int(s) >> 8, int(s) & 1, t) for t, s in enumerate(found))
    assert ours == pytest.approx(min(totals), abs=1e-5)


@given(st.binary(max_size=400))
def test_any_model_is_valid_or_an_error(data: bytes) -> None:
    try:
        model = EntropyModel.from_bytes(data)
    except CodecError:
        return
    assert model.to_bytes() == data


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=600),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=8),
    cut=st.integers(0, 600),
)
def test_any_bytes_end_in_a_result_or_an_error(
    data: bytes, flips: list[tuple[int, int]], cut: int
) -> None:
    tile = np.random.default_rng(0).standard_normal((8, 64), np.float32)
    payload, private, unit = code(tile, 0.5, "fast")
    damaged = bytearray(payload)
    for position, value in flips:
        damaged[position % len(damaged)] ^= value
    for bad in (data, bytes(damaged), bytes(damaged[: min(cut, len(damaged))])):
        results = []
        for level in HERE:
            out = np.zeros_like(tile)
            try:
                kernels.decode(tables_of(private, unit), bad, out, level)
            except CodecError as error:
                results.append(str(error))
            else:
                results.append(out.tobytes())
        assert all(result == results[0] for result in results)


def test_a_model_survives_storage() -> None:
    sample = np.random.default_rng(0).standard_normal(2**14).astype(np.float32)
    model = train(sample, 0.3, 5.0, 64)
    again = EntropyModel.from_bytes(model.to_bytes())
    assert again.states == 64
    for mine, theirs in zip(
        model.frequency + model.shift, again.frequency + again.shift, strict=True
    ):
        assert (mine == theirs).all()
    assert len(model.to_bytes()) < 64


@pytest.mark.parametrize("bits", [1, 1.5, 2, 2.5, 3, 4, 6])
def test_bits_of_a_real_weight(query: Tensor, bits: float) -> None:
    coded = CodecTensor.from_hp(query, codec_weight_only("ectcq", bits=bits, preset="medium"))
    assert bits - 0.03 < coded.bits_per_weight <= bits
    assert coded.header.snr_db > 6.02 * bits - 1.3


def test_outliers_stay_exact_and_cost_only_themselves(spiky: Tensor) -> None:
    coded = CodecTensor.from_hp(spiky, codec_weight_only(bits=2))
    assert coded.codec == "ectcq"
    largest = spiky.abs().flatten().topk(5).indices
    assert (coded.dequantize().flatten()[largest] == spiky.flatten()[largest]).all()


@pytest.mark.parametrize("tokens", [(), (1,), (3,), (2, 4), (cpu.FUSED_TOKENS,), (40,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_product_is_that_of_the_dense_weight(
    spiky: Tensor, tokens: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = (spiky + 0.02 * torch.arange(384)[:, None] / 384).to(dtype)  # with zero points
    coded = CodecTensor.from_hp(weight, codec_weight_only(bits=3, preset="fast"))
    x = torch.randn(*tokens, 1536, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.randn(384).to(dtype)
    expected = F.linear(x.double(), coded.dequantize(torch.float32).double(), bias.double())
    got = F.linear(x, coded, bias)
    assert got.dtype == dtype
    assert got.shape == (*tokens, 384)
    assert snr_db(expected, got.double()) > (90 if dtype == torch.float32 else 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_whole_matrices_decode_as_tile_by_tile(
    spiky: Tensor, dtype: torch.dtype, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = (spiky + 0.02 * torch.arange(384)[:, None] / 384).to(stored)
    coded = CodecTensor.from_hp(weight, codec_weight_only(bits=3, preset="fast"))
    assert coded.zero_point is not None
    whole = coded.dequantize(dtype)
    monkeypatch.setattr(ECTCQ, "decodes_whole", False)
    assert torch.equal(coded.dequantize(dtype), whole)


def test_no_dense_weight_is_made_for_a_product(
    query: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded = CodecTensor.from_hp(query, codec_weight_only(bits=3, preset="fast"))

    def never(*args: object) -> None:
        raise AssertionError("decoded to dense")

    monkeypatch.setattr(cpu, "decode_matrix", never)
    F.linear(torch.randn(4, 384), coded)
    F.linear(torch.randn(100, 384), coded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_take_groups_of_tiles(minilm: dict[str, Tensor], dtype: torch.dtype) -> None:
    weight = minilm["encoder.layer.0.intermediate.dense.weight"].to(dtype)
    coded = CodecTensor.from_hp(weight, codec_weight_only(bits=3, preset="fast"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert len(coded.header.tiles) > 2 * cpu._TILES_PER_THREAD
        x = torch.randn(50, 384, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = F.linear(x.double(), coded.dequantize().double())
        assert snr_db(expected, F.linear(x, coded)) > (90 if dtype == torch.float32 else 40)
    finally:
        torch.set_num_threads(threads)


def test_missing_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "library", lambda: None)
    info = ECTCQ().info()
    assert info.encoder is None
    assert "C++ compiler" in str(info.missing)


@pytest.mark.parametrize("states", [-8, 0, 4, 7, 128, 512])
def test_a_trellis_that_is_not_there_is_refused(states: int) -> None:
    tile = np.random.default_rng(0).standard_normal(1024).astype(np.float32)
    model, _kept = train(tile, 0.5, 6.0, 8).search_model(0.5, 6.0)
    model.states = states
    told = rf"model\.states={states}: allowed: 8, 64, 256"
    for level in HERE:
        with pytest.raises(ValueError, match=told):
            kernels.search(model, tile, level)
        with pytest.raises(ValueError, match=told):
            kernels.encode(model, tile.reshape(32, 32), level)
