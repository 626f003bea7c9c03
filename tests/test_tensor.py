"""CodecTensor as a PyTorch weight."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import ALL, snr_db
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchcodec_weights import CodecTensor, codec_weight_only, decoded_cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 4), (0,)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_is_the_dense_one(
    query: Tensor, dtype: torch.dtype, lead: tuple[int, ...], with_bias: bool
) -> None:
    coded = CodecTensor.from_hp(query.to(dtype), codec_weight_only("h264", bits=4, preset="fast"))
    assert coded.dtype == dtype
    dense = coded.dequantize()
    assert dense.dtype == dtype
    x = torch.randn(*lead, 384, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(384, generator=torch.Generator().manual_seed(2)).to(dtype)
    bias_or_none = bias if with_bias else None
    torch.testing.assert_close(
        F.linear(x, coded, bias_or_none), F.linear(x, dense, bias_or_none), rtol=0, atol=0
    )


def test_gradients_are_those_of_the_dense_weight(coded_query: CodecTensor) -> None:
    dense = coded_query.dequantize()
    x = torch.randn(3, 384, requires_grad=True)
    bias = torch.randn(384, requires_grad=True)
    F.linear(x, coded_query, bias).square().sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    got = x.grad.clone(), bias.grad.clone()
    x.grad = bias.grad = None
    F.linear(x, dense, bias).square().sum().backward()
    torch.testing.assert_close(got, (x.grad, bias.grad))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.one_of(st.integers(1, 40), st.sampled_from([97, 131, 1000])),
    cols=st.one_of(st.integers(1, 40), st.sampled_from([89, 127, 700])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    codec=st.sampled_from([codec for codec in ALL if codec != "vvc"]),
    bits=st.sampled_from([2, 4, 6]),
)
def test_any_shape_dtype_and_rate(
    rows: int, cols: int, dtype: torch.dtype, codec: str, bits: int
) -> None:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)).to(dtype)
    config = codec_weight_only(codec, snr_db=6.0 * bits - 5)
    coded = CodecTensor.from_hp(weight, config)
    assert coded.shape == weight.shape
    assert coded.header.snr_db >= 6.0 * bits - 5
    x = torch.randn(2, cols, generator=torch.Generator().manual_seed(cols)).to(dtype)
    expected = F.linear(x.double(), coded.dequantize(torch.float32).double())
    assert snr_db(expected, F.linear(x, coded)) > (90 if dtype == torch.float32 else 35)


@pytest.mark.parametrize("codec", ALL)
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (3, 5), (127, 131)])
@pytest.mark.parametrize("kind", ["random", "constant", "zero"])
def test_odd_weights(codec: str, shape: tuple[int, int], kind: str) -> None:
    weight = {
        "random": torch.randn(shape, generator=torch.Generator().manual_seed(0)),
        "constant": torch.full(shape, -0.3),
        "zero": torch.zeros(shape),
    }[kind]
    coded = CodecTensor.from_hp(weight, codec_weight_only(codec, step=0.1))
    error = (coded.dequantize() - weight).abs().max()
    # A column of one constant is a figure on gray ground for a codec of pictures, not all gray.
    assert error <= {"random": 0.8, "constant": 0.15, "zero": 0}[kind]


@pytest.mark.parametrize("codec", ALL)
def test_constant_of_real_size_takes_next_to_nothing(codec: str) -> None:
    weight = torch.full((512, 512), 0.7)
    coded = CodecTensor.from_hp(weight, codec_weight_only(codec, bits=2))
    assert coded.bits_per_weight < 0.2
    torch.testing.assert_close(coded.dequantize(), weight)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(5), r"weight.shape=\(5,\): allowed: 2 dimensions or more"),
        (torch.zeros(0, 4), r"weight.shape=\(0, 4\): allowed: at least one weight"),
        (torch.zeros(4, 4, dtype=torch.int32), "weight.dtype=torch.int32: allowed: torch.float32"),
        (torch.zeros(4, 4, dtype=torch.float64), "weight.dtype=torch.float64: allowed"),
        (torch.full((4, 4), torch.nan), "NaN or infinity"),
        (torch.tensor([[1.0, torch.inf]]), "NaN or infinity"),
        (torch.zeros(4, 4, device="meta"), "meta device"),
    ],
)
def test_what_cannot_be_encoded(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodecTensor.from_hp(weight, codec_weight_only("h264", bits=2))


def test_wrong_inputs_name_the_argument(coded_query: CodecTensor) -> None:
    with pytest.raises(ValueError, match=r"input.shape=\(2, 100\): the last dimension must be 384"):
        F.linear(torch.zeros(2, 100), coded_query)
    with pytest.raises(ValueError, match=r"input.dtype=torch.float16"):
        F.linear(torch.zeros(2, 384, dtype=torch.float16), coded_query)
    with pytest.raises(NotImplementedError, match=r"aten.mul.*\.dequantize\(\)"):
        coded_query * 2
    with pytest.raises(NotImplementedError, match=r"not its input"):
        F.linear(coded_query, torch.zeros(2, 384))


def same(a: CodecTensor, b: Tensor) -> bool:
    assert isinstance(b, CodecTensor)
    names = a.__tensor_flatten__()[0]
    assert names == b.__tensor_flatten__()[0]
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


@pytest.mark.parametrize("clone", [copy.deepcopy, torch.clone, torch.detach])
def test_clones(coded_query: CodecTensor, clone: object) -> None:
    twin = clone(coded_query)  # type: ignore[operator]
    assert same(coded_query, twin)
    assert torch.equal(twin.dequantize(), coded_query.dequantize())


def test_pickle(coded_query: CodecTensor) -> None:
    assert same(coded_query, pickle.loads(pickle.dumps(coded_query)))


def test_save_and_load_with_weights_only(coded_query: CodecTensor) -> None:
    file = io.BytesIO()
    torch.save(coded_query, file)
    assert len(file.getvalue()) < coded_query.stored_bytes + 4000
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert same(coded_query, loaded)
    assert loaded.dtype == coded_query.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_to_dtype_changes_only_what_it_decodes_to(
    coded_query: CodecTensor, dtype: torch.dtype
) -> None:
    moved = coded_query.to(dtype)
    assert moved.dtype == dtype
    assert same(coded_query, moved)
    expected = coded_query.dequantize().to(dtype)
    assert torch.equal(moved.dequantize(), expected)
    assert torch.equal(coded_query.dequantize(dtype), expected)


def test_to_refuses_other_dtypes(coded_query: CodecTensor) -> None:
    with pytest.raises(ValueError, match=r"dtype=torch\.int8"):
        coded_query.to(torch.int8)


def test_to_meta(coded_query: CodecTensor) -> None:
    meta = coded_query.to("meta")
    assert meta.device.type == "meta"
    assert meta.shape == coded_query.shape
    assert "no data" in repr(meta)


def test_repr_is_for_people(coded_query: CodecTensor) -> None:
    text = repr(coded_query)
    assert "shape=(384, 384)" in text
    assert "codec='h264'" in text
    assert "bits_per_weight=2.9" in text or "bits_per_weight=3.0" in text
    assert len(text) < 200


def linear_of(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(384, 384, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def test_state_dict_with_assign(coded_query: CodecTensor) -> None:
    state = linear_of(coded_query).state_dict()
    for target in (nn.Linear(384, 384, bias=False), linear_of(coded_query.clone())):
        target.load_state_dict(state, assign=True)
        assert same(coded_query, target.weight.data)
    with torch.device("meta"):
        meta = nn.Linear(384, 384, bias=False)
    meta.load_state_dict(state, assign=True)
    assert same(coded_query, meta.weight.data)


def test_state_dict_in_place(coded_query: CodecTensor, query: Tensor) -> None:
    target = linear_of(coded_query.clone())
    target.load_state_dict(linear_of(coded_query).state_dict())
    assert same(coded_query, target.weight.data)
    other = CodecTensor.from_hp(query, codec_weight_only("h264", bits=2))
    with pytest.raises(RuntimeError, match="load with assign=True"):
        target.load_state_dict(linear_of(other).state_dict())
    dense = nn.Linear(384, 384, bias=False)
    dense.load_state_dict(linear_of(coded_query).state_dict())
    assert torch.equal(dense.weight, coded_query.dequantize())
    with pytest.raises(RuntimeError, match="copy_ of a dense tensor into a CodecTensor"):
        target.load_state_dict(dense.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_mode(spiky: Tensor, dtype: torch.dtype) -> None:
    config = codec_weight_only("h264", bits=2, preset="fast")
    coded = CodecTensor.from_hp(spiky.to(dtype), config)
    assert len(coded.header.tiles) > 1, "decoded by threads that are not in inference mode"
    x = torch.randn(2, 1536, dtype=dtype)
    expected = F.linear(x, coded)
    with torch.inference_mode():
        assert torch.equal(F.linear(x, coded), expected)


def test_decoded_cache_keeps_what_fits(
    coded_query: CodecTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchcodec_weights.decoders import cpu

    decodes = []
    original = cpu.decode_matrix
    monkeypatch.setattr(cpu, "decode_matrix", lambda *a: decodes.append(1) or original(*a))
    x = torch.randn(2, 384)
    expected = F.linear(x, coded_query)
    F.linear(x, coded_query)
    assert len(decodes) == 2
    with decoded_cache(4 * 384 * 384):
        for _ in range(3):
            assert torch.equal(F.linear(x, coded_query), expected)
        assert len(decodes) == 3
        coded_query.dequantize().zero_()
        assert torch.equal(F.linear(x, coded_query), expected)
    with decoded_cache(4 * 384 * 384 - 1):
        F.linear(x, coded_query)
        F.linear(x, coded_query)
        assert len(decodes) == 5
    with pytest.raises(ValueError, match="max_bytes=-1"):
        decoded_cache(-1)


def test_compiled(coded_query: CodecTensor) -> None:
    layer = linear_of(coded_query)
    x = torch.randn(2, 384)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
