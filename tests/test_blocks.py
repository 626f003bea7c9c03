"""Tiles that are blocks of a matrix, with steps of their own."""

import pytest
import torch
import torch.nn.functional as F
from conftest import fastest, snr_db
from torch import Tensor

from torchcodec_weights import CodecError, CodecTensor, codec_weight_only

SHAPE = [100, 150]


def encode(weight: Tensor, codec: str, *, bits: float = 3, **options: object) -> CodecTensor:
    config = codec_weight_only(codec, bits=bits, preset=fastest(codec), **options)  # type: ignore[arg-type]
    return CodecTensor.from_hp(weight, config)


@pytest.fixture(scope="module", params=["ectcq", "h264", "jpeg2000"])
def blocks(request: pytest.FixtureRequest, query: Tensor) -> CodecTensor:
    return encode(query, request.param, bits=4, tile_shape=SHAPE)


def test_blocks_decode_to_the_weight(blocks: CodecTensor, query: Tensor) -> None:
    header = blocks.header
    assert (len(header.tiles), header.across) == (12, 3)
    assert blocks.qdata[4] == 2, "the format that has blocks"
    assert 3.97 < blocks.bits_per_weight <= 4
    assert abs(snr_db(query, blocks.dequantize()) - header.snr_db) < 0.01
    assert header.snr_db > 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_slices_of_blocks(blocks: CodecTensor, dtype: torch.dtype) -> None:
    weight = blocks.to(dtype)
    dense = weight.dequantize()
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(F.linear(x, weight), F.linear(x, dense))
    assert torch.equal(weight[101:203, 50:60].dequantize(), dense[101:203, 50:60])
    indices = torch.tensor([[0, 383], [96, 200]])
    assert torch.equal(F.embedding(indices, weight), F.embedding(indices, dense))
    half = weight[:96].contiguous()
    assert half.stored_bytes < 0.4 * weight.stored_bytes
    assert torch.equal(half.dequantize(), dense[:96])
    with pytest.raises(CodecError, match="is not here"):
        half.with_shape([384, 384], [0, 384, 0, 384]).dequantize()


def test_outliers_find_their_place_in_blocks(spiky: Tensor) -> None:
    coded = encode(spiky, "h264", tile_shape=[100, 200])
    assert coded.header.tiles["outliers_size"].any()
    far = spiky.abs() > 30 * spiky.std()
    assert far.any()
    assert torch.equal(coded.dequantize()[far], spiky[far])


@pytest.mark.parametrize("position", [4, 52, 60, 80, -1])
def test_damage_in_blocks(blocks: CodecTensor, position: int) -> None:
    broken = blocks.clone()
    broken.qdata[position] ^= 255
    with pytest.raises(CodecError):
        broken.dequantize()


@pytest.mark.parametrize("codec", ["h264", "jpeg2000"])
def test_adaptive_steps_lower_the_error_at_the_same_bits(codec: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 512, generator=generator)
    weight[:256] *= 8
    weight[:, :256] *= 4
    options = {"bits": 3.0, "tile_shape": [128, 128]}
    uniform = encode(weight, codec, **options)  # type: ignore[arg-type]
    adaptive = encode(weight, codec, tile_steps="adaptive", **options)  # type: ignore[arg-type]
    assert 2.97 < adaptive.bits_per_weight <= 3
    # Of four quarters with deviations 32, 8, 4 and 1, reverse water-filling wins 10 log10 of the
    # arithmetic over the geometric mean of their variances: 9 dB, and its tiles cost some.
    assert adaptive.header.snr_db > uniform.header.snr_db + 5


@pytest.mark.parametrize(
    ("codec", "options", "message"),
    [
        ("ectcq", {"tile_steps": "adaptive"}, "tile_steps='adaptive' with codec 'ectcq'"),
        ("h264", {"tile_steps": "best"}, "tile_steps='best': allowed: 'uniform', 'adaptive'"),
        ("h264", {"tile_shape": [0, 4]}, r"tile_shape=\[0, 4\]: allowed: two integers above 0"),
        ("h264", {"tile_shape": [4]}, r"tile_shape=\[4\]: allowed: two integers above 0"),
    ],
)
def test_what_is_refused(codec: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec_weight_only(codec, bits=3, **options)  # type: ignore[arg-type]


def test_lossless_has_no_blocks() -> None:
    with pytest.raises(ValueError, match=r"tile_shape=\(64, 64\) with codec 'lossless'"):
        codec_weight_only("lossless", tile_shape=[64, 64])
