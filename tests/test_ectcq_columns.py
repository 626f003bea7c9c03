"""ECTCQ's streams by columns: kernels against the reference, feedback, classes, bad bytes."""

from itertools import pairwise

import google_crc32c
import numpy as np
import pytest
import torch
from ectcq_reference import decode_columns as reference_decode
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from torchcodec_weights import CodecError
from torchcodec_weights.codecs.common import compiled
from torchcodec_weights.codecs.common.compiled import matrix_view
from torchcodec_weights.codecs.ectcq import ECTCQ, column_kernels
from torchcodec_weights.codecs.ectcq.column_training import sample_rows
from torchcodec_weights.codecs.ectcq.columns import (
    MAX_CLASSES,
    ColumnModel,
    decoder_classes_of,
    decoder_classes_of_matrix,
    search_classes_of,
)
from torchcodec_weights.codecs.records import (
    EncoderSettings,
    ErrorFeedback,
    FloatArray,
    StoredMatrix,
)
from torchcodec_weights.errors import StepTooFineError
from torchcodec_weights.format.container import Outliers, pack_outliers
from torchcodec_weights.format.dtypes import DTYPE_CODES
from torchcodec_weights.format.tiling import Window

HERE = range(compiled.best_level() + 1)
FAST = EncoderSettings("fast")


def varied(rows: int, cols: int, spread: float = 1.0, seed: int = 0) -> FloatArray:
    """Gaussian weights, columns' deviations falling from e^spread to e^−spread."""
    z = np.random.default_rng(seed).standard_normal((rows, cols), np.float32)
    return z * np.exp(np.linspace(spread, -spread, cols, dtype=np.float32))


def cut(z: FloatArray, count: int) -> list[FloatArray]:
    """Tiles as a container has them."""
    bounds = [i * len(z) // count for i in range(count + 1)]
    return [z[a:b] for a, b in pairwise(bounds)]


def stored_matrix(
    tiles: list[FloatArray],
    step: float,
    *,
    order: NDArray[np.uint32] | None = None,
    scales: bool = False,
    outliers: list[tuple[int, int, float]] | None = None,
    feedback: ErrorFeedback | None = None,
) -> StoredMatrix:
    """Encode tiles, columns in coded order.

    Args:
        outliers: (row of the matrix, column in its own order, value).
    """
    codec = ECTCQ()
    rows, cols = sum(map(len, tiles)), tiles[0].shape[1]
    private = codec.prepare_columns(tiles, step, FAST, feedback)
    data, payloads, sections, crcs = b"", [], [], []
    first = 0
    for tile in tiles:
        coded = codec.encode_columns(tile, step, private, FAST, feedback)
        own = sorted((r - first, c, v) for r, c, v in outliers or () if 0 <= r - first < len(tile))
        positions = np.array([r * cols + c for r, c, _ in own], np.int64)
        values = np.array([v for _, _, v in own], np.float32).view(np.uint8)
        section = pack_outliers(Outliers(positions, values))
        payloads.append(coded.payload)
        sections.append(section)
        crcs.append(google_crc32c.value(coded.payload + section))
        data += coded.payload + section
        first += len(tile)
    sizes = np.array([len(p) + len(s) for p, s in zip(payloads, sections, strict=True)], np.uint64)
    rng = np.random.default_rng(1)
    one = np.ones(1, np.float32)
    return StoredMatrix(
        data=memoryview(data),
        offsets=np.cumsum(sizes) - sizes,
        payload_sizes=np.array([len(p) for p in payloads], np.uint32),
        outlier_sizes=np.array([len(s) for s in sections], np.uint32),
        crcs=np.array(crcs, np.uint32),
        units=np.full(len(tiles), step, np.float32),
        rows=rows,
        cols=cols,
        row_scale=rng.uniform(0.5, 2, rows).astype(np.float32) if scales else one,
        col_scale=rng.uniform(0.5, 2, cols).astype(np.float32) if scales else one,
        zero_point=rng.uniform(-1, 1, rows).astype(np.float32) if scales else None,
        dtype="float32",
        private=private,
        column_order=order,
    )


def decoded(matrix: StoredMatrix, dtype: torch.dtype, level: int, tiles: range) -> torch.Tensor:
    """Rows of some tiles, by the kernels of a level."""
    bounds = [i * matrix.rows // len(matrix.offsets) for i in (tiles.start, tiles.stop)]
    out = torch.full((bounds[1] - bounds[0], matrix.cols), torch.nan, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    classes, view = decoder_classes_of_matrix(matrix), matrix_view(matrix, tiles)
    column_kernels.decode_matrix(classes, view, out.data_ptr(), name, 2, level)
    return out


def expected_of(matrix: StoredMatrix, outliers: list[tuple[int, int, float]]) -> FloatArray:
    """The matrix in float32, by the reference decoder."""
    count, step = len(matrix.offsets), float(matrix.units[0])
    parts = []
    for i in range(count):
        rows = (i + 1) * matrix.rows // count - i * matrix.rows // count
        start = int(matrix.offsets[i])
        payload = bytes(matrix.data[start : start + int(matrix.payload_sizes[i])])
        parts.append(reference_decode(payload, matrix.private, step, (rows, matrix.cols)))
    z = np.concatenate(parts)
    if matrix.column_order is not None:
        z[:, matrix.column_order] = z.copy()
    z = z * matrix.row_scale[:, None] * matrix.col_scale
    if matrix.zero_point is not None:
        z = z + matrix.zero_point[:, None]
    for row, column, value in outliers:
        z[row, column] = value
    return z


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 150),
    cols=st.integers(1, 140),
    step=st.sampled_from([0.12, 0.3, 0.9, 2.5]),
    preset=st.sampled_from(["fast", "medium", "best"]),
    spread=st.sampled_from([0.0, 1.7]),
    seed=st.integers(0, 99),
)
def test_every_kernel_agrees_with_the_reference(
    rows: int, cols: int, step: float, preset: str, spread: float, seed: int
) -> None:
    tile = varied(rows, cols, spread, seed)[: max(1, 4096 // cols)]
    codec, chosen = ECTCQ(), EncoderSettings(preset)
    private = codec.prepare_columns([tile], step, chosen, None)
    coded = codec.encode_columns(tile, step, private, chosen, None)
    expected = reference_decode(coded.payload, private, coded.unit, tile.shape)
    for level in HERE:
        out = np.full_like(tile, np.nan)
        classes = decoder_classes_of(private, cols, coded.unit)
        column_kernels.decode_columns(classes, coded.payload, out, level)
        assert (out == expected).all(), compiled.LEVELS[level]
    # Half of 4 steps, the distance of levels of equal parity, where none is clipped.
    assert np.abs(expected - tile).max() < 5 * step


@pytest.mark.parametrize(
    ("rows", "cols", "tiles"),
    [(1, 32, 1), (70, 32, 1), (7, 20, 2), (131, 77, 2), (65, 1, 1), (1, 1, 1), (9, 320, 3)],
)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("scales", [False, True])
def test_matrices_are_those_of_the_reference(
    rows: int, cols: int, tiles: int, permuted: bool, scales: bool
) -> None:
    rng = np.random.default_rng(5)
    order = rng.permutation(cols).astype(np.uint32) if permuted else None
    outliers = [
        (int(p) // cols, int(p) % cols, float(v))
        for p, v in zip(
            rng.choice(rows * cols, min(9, rows * cols // 2), False),
            rng.standard_normal(9) * 9,
            strict=False,
        )
    ]
    outliers = [(r, c, float(np.float32(v))) for r, c, v in outliers]
    parts = cut(varied(rows, cols), tiles)
    matrix = stored_matrix(parts, 0.5, order=order, scales=scales, outliers=outliers)
    expected = expected_of(matrix, outliers)
    x = rng.standard_normal((3, cols)).astype(np.float32)
    scaled = np.ascontiguousarray(x * matrix.col_scale)
    product = (x.astype(np.float64) @ expected.T.astype(np.float64)).astype(np.float64)
    if matrix.zero_point is not None:
        product -= x.astype(np.float64).sum(1, keepdims=True) * matrix.zero_point
    everything = range(tiles)
    for level in HERE:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            got = decoded(matrix, dtype, level, everything)
            assert torch.equal(got, torch.from_numpy(expected).to(dtype))
        last = decoded(matrix, torch.float32, level, range(tiles - 1, tiles)).numpy()
        assert (last == expected[-len(last) :]).all()
        y = np.full((3, rows), np.nan, np.float32)
        view = matrix_view(matrix, everything)
        classes = decoder_classes_of_matrix(matrix)
        column_kernels.multiply_matrix(classes, view, scaled, y, 2, level)
        size = np.sqrt(np.square(x).sum(1)[:, None] * np.square(expected).sum(1))
        assert (np.abs(y - product) <= 2e-6 * (size + 1)).all()


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 7, 11])
@pytest.mark.parametrize("step", [0.6, 0.24, 0.12, 0.06])
@pytest.mark.parametrize("cols", [32, 70])
def test_tiles_decoded_together_are_those_of_the_scalar_decoder(
    tiles: int, step: float, cols: int
) -> None:
    """In one thread, so that several are; heights differ by one row, levels are few and many."""
    outliers = [(3, 5, 9.0), (4, cols - 1, -7.0), (67 * tiles - 1, 0, 8.0)]
    z = varied(67 * tiles + tiles // 2, cols, 0.8)
    matrix = stored_matrix(cut(z, tiles), step, scales=True, outliers=outliers)
    classes, view = decoder_classes_of_matrix(matrix), matrix_view(matrix, range(tiles))
    x = np.random.default_rng(2).standard_normal((3, cols)).astype(np.float32)
    expected = np.empty(z.shape, np.float32)
    column_kernels.decode_matrix(classes, view, expected.ctypes.data, "float32", 1, 0)
    assert matrix.zero_point is not None
    plain = (expected - matrix.zero_point[:, None]) / matrix.col_scale
    for level in HERE:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            out = torch.full(z.shape, torch.nan, dtype=dtype)
            name = str(dtype).removeprefix("torch.")
            column_kernels.decode_matrix(classes, view, out.data_ptr(), name, 1, level)
            assert torch.equal(out, torch.from_numpy(expected).to(dtype)), compiled.LEVELS[level]
        for tokens in (1, 3):
            y = np.full((tokens, len(z)), np.nan, np.float32)
            column_kernels.multiply_matrix(classes, view, x[:tokens], y, 1, level)
            assert np.abs(y - x[:tokens].astype(np.float64) @ plain.T).max() < 1e-4


def test_the_codec_decodes_and_multiplies_matrices() -> None:
    order = np.random.default_rng(0).permutation(96).astype(np.uint32)
    matrix = stored_matrix(cut(varied(40, 96), 2), 0.4, order=order, scales=True)
    out = np.empty((40, 96), np.float32)
    ECTCQ().decode_tiles(matrix, range(2), out.ctypes.data, "float32", 1)
    assert (out == expected_of(matrix, [])).all()
    x = np.random.default_rng(1).standard_normal((2, 96)).astype(np.float32)
    y = np.empty((2, 40), np.float32)
    product = ECTCQ().product(matrix, range(2), Window(0, 40, 0, 96))
    product(x.ctypes.data, DTYPE_CODES["float32"], 2, None, y.ctypes.data, 1)
    assert np.allclose(y, x @ out.T, atol=1e-4)


def autoregressive(cols: int, rho: float) -> FloatArray:
    """H of a first-order autoregressive input of variance 1."""
    places = np.arange(cols)
    return (rho ** np.abs(places[:, None] - places)).astype(np.float64)


def feedback_of(h: NDArray[np.float64], order: NDArray[np.uint32]) -> ErrorFeedback:
    """GPTQ's: by the rows of U, H⁻¹ = Uᵀ U, with columns in the order of quantization."""
    upper = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    factors = np.zeros_like(h)
    factors[np.ix_(order, order)] = np.triu(upper / np.diag(upper)[:, None], 1)
    return ErrorFeedback(factors.astype(np.float32), order)


@pytest.mark.parametrize("cols", [1, 31, 100, 200])
@pytest.mark.parametrize("level", HERE)
def test_errors_are_carried_as_the_recursion_says(cols: int, level: int) -> None:
    rng = np.random.default_rng(3)
    tile, step = varied(37, cols, 0.5), 0.5
    feedback = feedback_of(autoregressive(cols, 0.9), rng.permutation(cols).astype(np.uint32))
    private = ECTCQ().prepare_columns([tile], step, FAST, feedback)
    classes = search_classes_of(private, cols, step)
    searched, path = column_kernels.search_columns(classes, tile, feedback, level)
    payload = column_kernels.encode_columns(classes, tile, feedback, level)
    decoded = np.empty_like(tile)
    ECTCQ().decode(payload, step, private, tile.shape, decoded)
    z = tile.astype(np.float64)
    for i, j in enumerate(feedback.order):
        error = z[:, j] - decoded[:, j]
        for k in feedback.order[i + 1 :]:
            z[:, k] -= error * feedback.factors[j, k]
    assert np.abs(searched.T - z).max() < 1e-4
    # What was searched, searched once more without feedback, has the same paths.
    again = column_kernels.search_columns(classes, np.ascontiguousarray(searched.T), None, level)
    assert (again[1] == path).all()


def test_feedback_lowers_the_error_of_the_output() -> None:
    """By the ratio of the conditional variances to the variances, here 0.19."""
    cols, step = 256, 0.6
    h = autoregressive(cols, 0.9)
    order = np.arange(cols, dtype=np.uint32)[::-1].copy()
    tile = np.random.default_rng(0).standard_normal((128, cols), np.float32)
    costs, bits = [], []
    for feedback in (None, feedback_of(h, order)):
        private = ECTCQ().prepare_columns([tile], step, FAST, feedback)
        coded = ECTCQ().encode_columns(tile, step, private, FAST, feedback)
        out = np.empty_like(tile)
        ECTCQ().decode(coded.payload, coded.unit, private, tile.shape, out)
        error = (tile - out).astype(np.float64)
        costs.append(float(np.einsum("ri,ij,rj", error, h, error)))
        bits.append(8 * len(coded.payload) / tile.size)
    upper = np.linalg.cholesky(np.linalg.inv(h[::-1, ::-1]))
    expected = float(np.mean(1 / np.square(np.diag(upper))))
    assert expected < 0.2
    assert costs[1] / costs[0] == pytest.approx(expected, rel=0.06)
    assert bits[1] < bits[0] + 0.2


def test_classes_save_bits() -> None:
    tiles, step = cut(varied(256, 512, 1.7), 2), 0.5
    private = ECTCQ().prepare_columns(tiles, step, FAST, None)
    model = ColumnModel.from_bytes(private, 512)
    assert 1 < len(model.classes) <= MAX_CLASSES
    # One class, by a matrix whose columns all vary as the others' do together.
    mixed = np.random.default_rng(0).permutation(np.concatenate(tiles).reshape(-1))
    one = ECTCQ().prepare_columns(cut(mixed.reshape(256, 512), 2), step, FAST, None)
    assert len(ColumnModel.from_bytes(one, 512).classes) == 1
    sizes = [
        len(p) + sum(len(ECTCQ().encode_columns(t, step, p, FAST, None).payload) for t in tiles)
        for p in (private, one)
    ]
    assert sizes[0] < 0.93 * sizes[1]


def test_equal_columns_take_one_class() -> None:
    private = ECTCQ().prepare_columns([varied(256, 512, 0.0)], 0.5, FAST, None)
    assert len(ColumnModel.from_bytes(private, 512).classes) == 1


@pytest.mark.parametrize("preset", ["fast", "best"])
@pytest.mark.parametrize("step", [0.2, 0.6, 1.5])
@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("cols", [288, 300])
def test_bits_are_estimated(preset: str, step: float, carries: bool, cols: int) -> None:
    chosen = EncoderSettings(preset)
    z = varied(600, cols, 0.7) * np.exp(
        0.6 * np.random.default_rng(2).standard_normal((600, 1))
    ).astype(np.float32)
    tiles = cut(z, 4)
    order = np.arange(cols, dtype=np.uint32)
    feedback = feedback_of(autoregressive(cols, 0.8), order) if carries else None
    private = ECTCQ().prepare_columns(tiles, step, chosen, feedback)
    real = sum(
        8 * len(ECTCQ().encode_columns(tile, step, private, chosen, feedback).payload)
        for tile in tiles
    )
    estimate = ECTCQ().estimate_columns(tiles, step, chosen, feedback)
    assert estimate == pytest.approx(real / z.size, abs=0.02)


def test_a_matrix_without_weight_is_coded() -> None:
    tile = np.zeros((40, 70), np.float32)
    private = ECTCQ().prepare_columns([tile], 0.5, FAST, None)
    coded = ECTCQ().encode_columns(tile, 0.5, private, FAST, None)
    out = np.full_like(tile, np.nan)
    ECTCQ().decode(coded.payload, coded.unit, private, tile.shape, out)
    assert not out.any()


def test_weights_beyond_the_levels_are_refused() -> None:
    tile = varied(40, 64)
    with pytest.raises(StepTooFineError, match=r"weights reach \d+ steps of 0.01: allowed: 252"):
        ECTCQ().prepare_columns([tile], 0.01, FAST, None)


def test_weights_far_beyond_the_sample_are_clipped_to_the_outermost_level() -> None:
    """Errors that are carried reach further than any sample shows."""
    tile, step = varied(64, 64, 0.0), 0.5
    private = ECTCQ().prepare_columns([tile], step, FAST, None)
    model = ColumnModel.from_bytes(private, 64).classes[0]
    top = float(model.by_symbol()[1].max()) * step
    far = tile.copy()
    far[::9, ::7] = 1e9
    far[3::9, ::7] = -1e9
    coded = ECTCQ().encode_columns(far, step, private, FAST, None)
    out = np.empty_like(tile)
    ECTCQ().decode(coded.payload, coded.unit, private, tile.shape, out)
    assert (out[::9, ::7] > top - 2.5 * step).all()
    assert (out[3::9, ::7] < -top + 2.5 * step).all()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"factors": np.zeros((31, 32), np.float32)}, r"feedback\.factors: shape \(31, 32\)"),
        ({"order": np.zeros(32, np.uint32)}, r"feedback\.order: \[0, 0"),
        ({"order": np.arange(1, 33, dtype=np.uint32)}, r"feedback\.order: \[1, 2"),
        ({"order": np.arange(31, dtype=np.uint32)}, r"feedback\.order: \[0, 1"),
    ],
)
def test_feedback_that_does_not_fit_is_refused(
    changes: dict[str, NDArray[np.generic]], told: str
) -> None:
    arrays = {"factors": np.eye(32, dtype=np.float32), "order": np.arange(32, dtype=np.uint32)}
    with pytest.raises(ValueError, match=told):
        ECTCQ().prepare_columns([varied(8, 32)], 0.5, FAST, ErrorFeedback(**(arrays | changes)))


def test_sampled_rows_are_even() -> None:
    z = np.repeat(np.arange(1000, dtype=np.float32)[:, None], 2, axis=1)
    shuffled = np.random.default_rng(0).permutation(z)
    rows = sample_rows(cut(shuffled, 7))[:, 0]
    assert len(rows) == 256
    assert (np.abs(np.diff(np.sort(rows)) - 1000 / 256) < 1).all()
    places = np.flatnonzero(np.isin(shuffled[:, 0], rows))
    assert (shuffled[places, 0] == rows).all()
    assert (sample_rows(cut(z[:5], 2))[:, 0] == np.arange(5)).all()


@pytest.fixture(scope="module")
def small() -> StoredMatrix:
    return stored_matrix(cut(varied(24, 130, 1.7), 1), 0.5)


def attempts(private: bytes, payload: bytes, shape: tuple[int, int]) -> list[bytes | str]:
    """What each level makes of bytes: the weights or the error's message."""
    results: list[bytes | str] = []
    for level in HERE:
        out = np.zeros(shape, np.float32)
        try:
            classes = decoder_classes_of(private, shape[1], 0.5)
            column_kernels.decode_columns(classes, payload, out, level)
        except CodecError as error:
            results.append(str(error))
        else:
            results.append(out.tobytes())
    return results


def test_every_truncation_is_an_error(small: StoredMatrix) -> None:
    payload, shape = bytes(small.data), (small.rows, small.cols)
    classes = decoder_classes_of(small.private, small.cols, 0.5)
    out = np.empty(shape, np.float32)
    for size in range(len(payload)):
        with pytest.raises(CodecError):
            column_kernels.decode_columns(classes, payload[:size], out)
    with pytest.raises(CodecError):
        column_kernels.decode_columns(classes, payload + b"\0", out)
    for size in range(len(small.private)):
        with pytest.raises(CodecError):
            ColumnModel.from_bytes(small.private[:size], small.cols)
    with pytest.raises(CodecError):
        ColumnModel.from_bytes(small.private + b"\0", small.cols)


@settings(max_examples=150, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=8),
    of_private=st.booleans(),
)
def test_flipped_bytes_end_in_a_result_or_an_error(
    small: StoredMatrix, flips: list[tuple[int, int]], of_private: bool
) -> None:
    parts = [bytearray(small.private), bytearray(small.data)]
    damaged = parts[0] if of_private else parts[1]
    for position, value in flips:
        damaged[position % len(damaged)] ^= value
    results = attempts(bytes(parts[0]), bytes(parts[1]), (small.rows, small.cols))
    assert all(result == results[0] for result in results)


@given(st.binary(max_size=300), st.integers(1, 200))
def test_any_private_data_is_valid_or_an_error(data: bytes, cols: int) -> None:
    try:
        model = ColumnModel.from_bytes(b"\x83" + data, cols)
    except CodecError:
        return
    assert model.to_bytes() == b"\x83" + data


@pytest.mark.parametrize("classes", [0, 17])
def test_numbers_of_classes_are_checked(small: StoredMatrix, classes: int) -> None:
    bad = bytes([small.private[0], classes]) + small.private[2:]
    with pytest.raises(CodecError, match=f"{classes} classes of columns: allowed: 1 to 16"):
        ColumnModel.from_bytes(bad, small.cols)


def test_classes_that_are_not_there_are_an_error(small: StoredMatrix) -> None:
    model = ColumnModel.from_bytes(small.private, small.cols)
    assert len(model.of_group) == 5
    for byte in (0xF0, 0x01):  # of the last group, and after it
        bad = bytearray(small.private)
        bad[-1] = bad[-1] & 0x0F | byte if byte == 0xF0 else 0x0F
        with pytest.raises(CodecError, match="class that is not there"):
            ColumnModel.from_bytes(bytes(bad), small.cols)


def multiply_ones(matrix: StoredMatrix) -> None:
    x, y = np.ones((1, matrix.cols), np.float32), np.empty((1, matrix.rows), np.float32)
    tiles, window = range(len(matrix.offsets)), Window(0, matrix.rows, 0, matrix.cols)
    product = ECTCQ().product(matrix, tiles, window)
    product(x.ctypes.data, DTYPE_CODES["float32"], 1, None, y.ctypes.data, 1)


@pytest.mark.parametrize("order", [[0] * 64, list(range(1, 65))])
def test_orders_that_are_none_are_refused(order: list[int]) -> None:
    good = stored_matrix([varied(8, 64)], 0.5)
    matrix = StoredMatrix(**{**vars(good), "column_order": np.array(order, np.uint32)})
    out = np.empty((8, 64), np.float32)
    with pytest.raises(CodecError, match="sizes or tables of a stream do not fit"):
        ECTCQ().decode_tiles(matrix, range(1), out.ctypes.data, "float32", 1)
    with pytest.raises(CodecError, match="sizes or tables of a stream do not fit"):
        multiply_ones(matrix)


def test_damaged_tiles_are_named() -> None:
    good = stored_matrix(cut(varied(40, 64), 2), 0.5, outliers=[(3, 5, 9.0)])
    for position in (int(good.offsets[1]) + 9, len(good.data) - 1):
        data = bytearray(good.data)
        data[position] ^= 1
        matrix = StoredMatrix(**{**vars(good), "data": memoryview(bytes(data))})
        out = np.empty((40, 64), np.float32)
        with pytest.raises(CodecError, match=r"tile 1 is corrupt: checksum"):
            ECTCQ().decode_tiles(matrix, range(2), out.ctypes.data, "float32", 2)


def test_outlier_sections_are_checked() -> None:
    good = stored_matrix([varied(40, 64)], 0.5, outliers=[(3, 5, 9.0), (4, 1, -7.0)])
    start = int(good.payload_sizes[0])
    for position, value in ((start, 200), (start + 5, 255)):
        data = bytearray(good.data)
        data[position] = value
        crcs = np.array([google_crc32c.value(bytes(data))], np.uint32)
        changed = {"data": memoryview(bytes(data)), "crcs": crcs}
        matrix = StoredMatrix(**{**vars(good), **changed})
        out = np.empty((40, 64), np.float32)
        with pytest.raises(CodecError, match="outlier section is malformed"):
            ECTCQ().decode_tiles(matrix, range(1), out.ctypes.data, "float32", 1)
        with pytest.raises(CodecError, match="outlier section is malformed"):
            multiply_ones(matrix)
