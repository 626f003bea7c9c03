"""The lossless codec: every bit returned, kernels against the reference decoder, bad bytes."""

import json
from math import isinf

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lossless_reference import decode as reference_decode
from torch import Tensor, nn
from torchao.quantization import FqnToConfig

from torchcodec_weights import (
    CodecError,
    CodecTensor,
    codec_weight_only,
    compression_report,
    quantize_,
)
from torchcodec_weights.codecs.common import compiled
from torchcodec_weights.codecs.lossless import Lossless, kernels
from torchcodec_weights.codecs.records import CodecInfo
from torchcodec_weights.matrix.opened import open_matrix

CONFIG = codec_weight_only("lossless")
DTYPES = ("float32", "float16", "bfloat16")
HERE = range(compiled.best_level() + 1)
UINT = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}
EXPONENT = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}


def as_tensor(bits: np.ndarray, dtype: str) -> Tensor:
    signed = bits.view(np.int32 if dtype == "float32" else np.int16)
    return torch.from_numpy(signed.copy()).view(getattr(torch, dtype))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def pattern(kind: str, dtype: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Bits of finite weights, ordinary and not."""
    rng = np.random.default_rng(seed)
    uint, exponent = UINT[dtype], EXPONENT[dtype]
    width = 8 * np.dtype(uint).itemsize
    anything = rng.integers(0, 2**width, shape, np.uint64).astype(uint)
    normal = torch.from_numpy(rng.standard_normal(shape) * 0.03)
    if kind == "normal":
        as_bytes = normal.to(getattr(torch, dtype)).view(torch.uint8).numpy()
        bits = as_bytes.reshape(-1).view(uint).reshape(shape)
    elif kind == "random":
        bits = anything
    elif kind == "constant":
        bits = np.full(shape, anything.flat[0])
    elif kind == "zeros":
        bits = anything & uint(1 << (width - 1))  # of both signs
    elif kind == "subnormal":
        bits = anything & ~uint(exponent)
    elif kind == "sparse":
        bits = np.where(anything % 3 == 0, anything, 0).astype(uint)
    elif kind == "few":
        bits = rng.choice(anything.reshape(-1)[:3], shape)
    elif kind == "bfloat16 values":
        dense = normal.bfloat16().to(getattr(torch, dtype)).view(torch.uint8).numpy()
        bits = dense.reshape(-1).view(uint).reshape(shape)
    else:  # nearly all alike, and one from the other end
        bits = np.full(shape, uint(exponent // 2))
        bits.flat[-1] = anything.flat[0] & uint(exponent // 4)
    # Infinity and NaN are no weights.
    return np.where((bits & uint(exponent)) == exponent, bits ^ uint(exponent & -exponent), bits)


KINDS = (
    "normal",
    "random",
    "constant",
    "zeros",
    "subnormal",
    "sparse",
    "few",
    "bfloat16 values",
    "one apart",
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
)
def test_every_kernel_agrees_with_the_reference(
    rows: int, cols: int, dtype: str, kind: str, seed: int
) -> None:
    bits = pattern(kind, dtype, (rows, cols), seed)
    codec = Lossless()
    private = codec.prepare_bits([bits], dtype)
    payload, outliers = codec.encode_bits(bits, dtype, private)
    expected = reference_decode(payload, private, dtype, bits.size).reshape(bits.shape)
    wrong = np.flatnonzero(expected.reshape(-1) != bits.reshape(-1))
    assert np.isin(wrong, outliers).all()
    for level in HERE:
        out = np.empty_like(bits)
        kernels.decode(payload, dtype, private, out, level)
        assert (out == expected).all(), compiled.LEVELS[level]


@settings(max_examples=150, deadline=None)
@given(
    rows=st.one_of(st.integers(1, 40), st.sampled_from([97, 131, 1000])),
    cols=st.one_of(st.integers(1, 40), st.sampled_from([89, 127, 700])),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
)
def test_every_bit_comes_back(rows: int, cols: int, dtype: str, kind: str, seed: int) -> None:
    weight = as_tensor(pattern(kind, dtype, (rows, cols), seed), dtype)
    coded = CodecTensor.from_hp(weight, CONFIG)
    assert same_bits(coded.dequantize(), weight)
    for other in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(coded.dequantize(other), weight.to(other))
    # Never much larger than the weight: a header, tables, the last group of each plane.
    assert coded.stored_bytes < weight.nbytes + 2200 * len(coded.header.tiles)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_finite_values_there_are(dtype: str) -> None:
    """Of float32, all that have a bfloat16's first half, with random low bits."""
    every = np.arange(2**16, dtype=np.uint32)
    if dtype == "float32":
        every = every << 16 | np.random.default_rng(0).integers(0, 2**16, 2**16, np.uint32)
    bits = every.astype(UINT[dtype])
    bits = bits[(bits & EXPONENT[dtype]) != EXPONENT[dtype]]
    weight = as_tensor(bits.reshape(2, -1), dtype)
    assert same_bits(CodecTensor.from_hp(weight, CONFIG).dequantize(), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_weights_take_less_than_their_exponents_entropy(
    minilm: dict[str, Tensor], dtype: str
) -> None:
    weight = minilm["encoder.layer.0.intermediate.dense.weight"].to(getattr(torch, dtype))
    coded = CodecTensor.from_hp(weight, CONFIG)
    assert same_bits(coded.dequantize(), weight)
    _, exponents = torch.frexp(weight.float())
    counts = exponents.flatten().unique(return_counts=True)[1].double()
    entropy = float(-(counts / counts.sum()).log2() @ counts / counts.sum())
    mantissa = {"float32": 23, "float16": 10, "bfloat16": 7}[dtype]
    assert coded.bits_per_weight < 1 + mantissa + entropy - 0.03


def test_dead_low_bits_cost_next_to_nothing(query: Tensor) -> None:
    for dtype, most in ((torch.bfloat16, 0.01), (torch.float16, 0.15)):
        short = CodecTensor.from_hp(query.to(dtype), CONFIG)
        long = CodecTensor.from_hp(query.to(dtype).float(), CONFIG)
        assert long.bits_per_weight - short.bits_per_weight < most


def test_constants_cost_next_to_nothing() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for value in (0.0, -0.0, 0.7):
            weight = torch.full((512, 512), value, dtype=dtype)
            coded = CodecTensor.from_hp(weight, CONFIG)
            assert same_bits(coded.dequantize(), weight)
            assert coded.bits_per_weight < 0.01


@pytest.mark.parametrize("name", ["bits", "step", "snr_db"])
def test_takes_no_target(name: str) -> None:
    with pytest.raises(ValueError, match=f"none may be given with codec 'lossless'.*'{name}': 8"):
        codec_weight_only("lossless", **{name: 8})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="preset='best' with codec 'lossless'"):
        codec_weight_only("lossless", preset="best")
    with pytest.raises(ValueError, match="exactly one must be given, got none"):
        codec_weight_only("ectcq")


def test_says_that_it_is_not_lossy(query: Tensor) -> None:
    info: CodecInfo = Lossless().info()
    assert not info.lossy
    coded = CodecTensor.from_hp(query, CONFIG)
    assert isinf(coded.header.snr_db)
    layer = nn.Linear(384, 384)
    layer.weight = nn.Parameter(coded, requires_grad=False)
    report = compression_report(layer)
    assert not report.weights[0].lossy
    assert "inf" in str(report)
    assert json.loads(report.to_json())["weights"][0]["snr_db"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(), (1,), (2, 3), (40,)])
def test_linear_is_the_dense_one(
    spiky: Tensor, dtype: torch.dtype, tokens: tuple[int, ...]
) -> None:
    weight = spiky.to(dtype)
    coded = CodecTensor.from_hp(weight, CONFIG)
    assert len(coded.header.tiles) > 1
    x = torch.randn(*tokens, 1536, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = F.linear(x.double(), weight.double())
    got = F.linear(x, coded)
    assert got.dtype == dtype
    error = (got.double() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_beside_a_lossy_codec(minilm: dict[str, Tensor]) -> None:
    head = minilm["encoder.layer.3.intermediate.dense.weight"]
    body = minilm["encoder.layer.3.attention.self.query.weight"]
    model = nn.ModuleDict({"body": nn.Linear(384, 384), "lm_head": nn.Linear(384, 1536)})
    model["body"].weight = nn.Parameter(body.clone())
    model["lm_head"].weight = nn.Parameter(head.clone())
    rest = codec_weight_only("ectcq", bits=3, preset="fast")
    quantize_(model, FqnToConfig({"lm_head": CONFIG, "_default": rest}))
    rows = {row.name: row for row in compression_report(model).weights}
    assert rows["lm_head.weight"].codec == "lossless"
    assert rows["body.weight"].codec == "ectcq"
    assert rows["body.weight"].lossy
    assert same_bits(model["lm_head"].weight.data.dequantize(), head)


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=600),
    private=st.binary(max_size=300),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=8),
    cut=st.integers(0, 5000),
    dtype=st.sampled_from(DTYPES),
)
def test_any_bytes_end_in_a_result_or_an_error(
    data: bytes, private: bytes, flips: list[tuple[int, int]], cut: int, dtype: str
) -> None:
    bits = pattern("normal", dtype, (8, 71), 0)
    good = Lossless().prepare_bits([bits], dtype)
    payload, _ = Lossless().encode_bits(bits, dtype, good)
    damaged, table = bytearray(payload), bytearray(good)
    for position, value in flips:
        damaged[position % len(damaged)] ^= value
        table[position % len(table)] ^= value
    cases = [
        (good, data),
        (good, bytes(damaged)),
        (good, bytes(damaged[:cut])),
        (private, payload),
        (bytes(table), payload),
    ]
    for shared, bad in cases:
        results = []
        for level in HERE:
            out = np.zeros_like(bits)
            try:
                kernels.decode(bad, dtype, shared, out, level)
            except CodecError as error:
                results.append(str(error).encode())
            else:
                results.append(out.tobytes())
        assert all(result == results[0] for result in results)


def test_a_damaged_container_is_an_error(spiky: Tensor) -> None:
    coded = CodecTensor.from_hp(spiky.bfloat16(), CONFIG)
    tiles = coded.header.tiles
    assert len(tiles) > 2
    coded.qdata[int(coded.header.offsets[2]) + 1000] ^= 1
    with pytest.raises(CodecError, match=r"lossless: tile 2 is corrupt: checksum"):
        coded.dequantize()
    with pytest.raises(CodecError, match="tile 2"):
        F.linear(torch.zeros(1, 1536, dtype=torch.bfloat16), coded)


def test_a_matrix_with_foreign_private_data_is_an_error(query: Tensor) -> None:
    coded = CodecTensor.from_hp(query, CONFIG)
    matrix = open_matrix(coded.qdata, coded.scale, None, coded.act_pre_scale)
    tiles = compiled.matrix_view(matrix.stored(), range(len(matrix.header.tiles)))
    out = torch.empty(384, 384)
    with pytest.raises(CodecError, match="sizes or tables of a stream do not fit"):
        kernels.decode_matrix(b"\x00\x00\x00", tiles, out.data_ptr(), "float32", 1)
