"""Format 3: rows and columns that codecs get sorted by their scales."""

import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALL, fastest
from torch import Tensor, nn

from torchcodec_weights import (
    CodecError,
    CodecTensor,
    codec_weight_only,
    load_file,
    save_file,
)
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.decoders.cpu import _decode_tile
from torchcodec_weights.format import container
from torchcodec_weights.format.container import SORTED_COLUMNS, SORTED_ROWS, crc32c, parse_header
from torchcodec_weights.format.order import restore_order, sorted_order
from torchcodec_weights.matrix.importance import Importance
from torchcodec_weights.matrix.opened import open_matrix


def header(order: int, *, across: int = 1, version: int | None = None) -> bytes:
    data = bytearray(
        container.pack(
            codec="demo",
            dtype="float32",
            shape=(4, 4),
            bases=(1.0, 1.0),
            snr_db=1.0,
            vectors_crc=0,
            private=b"",
            payloads=[b"a"] * across,
            outliers=[b""] * across,
            units=[1.0] * across,
            across=across,
            order=order,
        )
    )
    if version is not None:
        struct.pack_into("<H", data, 4, version)
        (size,) = struct.unpack_from("<I", data, 8)
        struct.pack_into("<I", data, size - 4, crc32c(bytes(data[: size - 4])))
    return bytes(data)


@pytest.mark.parametrize(
    ("order", "across", "version"), [(0, 1, 1), (0, 2, 2), (1, 1, 3), (2, 1, 3), (3, 1, 3)]
)
def test_a_writer_takes_the_lowest_version(order: int, across: int, version: int) -> None:
    data = header(order, across=across)
    assert struct.unpack_from("<H", data, 4) == (version,)
    found = parse_header(memoryview(data))
    assert (found.order, found.across) == (order, across)


def test_orders_that_the_format_does_not_allow() -> None:
    for order in (4, 7, 2**31):
        with pytest.raises(CodecError, match="values that format 3 does not allow"):
            parse_header(memoryview(header(order)))
    with pytest.raises(CodecError, match="values that format 3 does not allow"):
        parse_header(memoryview(header(SORTED_COLUMNS, across=2)))
    with pytest.raises(CodecError, match="its sizes do not agree"):
        parse_header(memoryview(header(SORTED_COLUMNS, version=2)))


def test_sorted_order_is_stable_and_ignores_signs() -> None:
    codes = np.array([5, 3 | 128, 5 | 128, 3, 9, 0], np.uint8)
    assert sorted_order(codes, 6).tolist() == [5, 1, 3, 0, 2, 4]
    assert sorted_order(codes[:1], 4).tolist() == [0, 1, 2, 3]
    z = np.arange(24.0).reshape(4, 6)
    rows = np.array([2, 0, 3, 1], np.uint32)
    coded = z[rows][:, sorted_order(codes, 6)].copy()
    restore_order(coded, rows, sorted_order(codes, 6))
    assert np.array_equal(coded, z)


def important(weight: Tensor) -> Importance:
    """Importance that differs by factors of a thousand, with correlated inputs."""
    rng = np.random.default_rng(1)
    rows, cols = weight.shape
    x = rng.standard_normal((4 * cols, cols)) * np.exp(rng.uniform(-2, 2, cols))
    x[:, 1:] += 0.5 * x[:, :-1]
    moments = (x.T @ x / len(x)).astype(np.float32)
    return Importance(np.exp(rng.uniform(-3, 3, rows)).astype(np.float32), moments)


def coded(weight: Tensor, codec: str, bits: float = 3.0) -> CodecTensor:
    config = codec_weight_only(codec, bits=bits, preset=fastest(codec))
    return CodecTensor.from_hp(weight, config.with_importance(important(weight), bits))


@pytest.mark.parametrize("codec", ALL)
def test_sorted_weights_come_back_in_their_order(codec: str, query: Tensor) -> None:
    if get_codec(codec).info().missing:
        pytest.skip(f"{codec} is not available")
    tensor = coded(query, codec)
    head = tensor.header
    assert head.order & SORTED_COLUMNS
    assert bool(head.order & SORTED_ROWS) != get_codec(codec).decodes_whole
    assert 2.97 < tensor.bits_per_weight <= 3
    decoded = tensor.dequantize()
    # Where a step is fine the weight is near: the error follows the steps.
    importance = important(query)
    cost = importance.rows[:, None] * importance.columns
    error = (decoded - query).square().numpy()
    fine = cost > np.quantile(cost, 0.9)
    coarse = cost < np.quantile(cost, 0.1)
    assert error[coarse].mean() > 20 * error[fine].mean()
    energy = query.square().numpy()
    assert error[fine].mean() < 0.02 * energy[fine].mean()
    # Any rows and columns are those of the whole.
    rows = torch.tensor([0, 383, 17, 17, 200])
    assert torch.equal(torch.nn.functional.embedding(rows, tensor), decoded[rows])
    assert torch.equal(tensor[100:200, 8:50].dequantize(), decoded[100:200, 8:50])
    x = torch.randn(3, query.shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.nn.functional.linear(x, tensor), x @ decoded.T)
    assert torch.equal(tensor.t().dequantize(), decoded.T)


@pytest.mark.parametrize("codec", ["ectcq", "h264"])
def test_sorted_weights_in_layers_files_and_graphs(codec: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2100, 256, generator=generator)
    layer = nn.Linear(256, 2100)
    layer.weight = nn.Parameter(coded(weight, codec, 2.0), requires_grad=False)
    assert len(layer.weight.header.tiles) > 1
    decoded = layer.weight.dequantize()
    x = torch.randn(3, 256, generator=generator, requires_grad=True)
    expected = nn.functional.linear(x, decoded, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0])
    # A slice keeps its tiles only, and joins again.
    upper = layer.weight.data[:200].contiguous()
    assert upper.stored_bytes < 0.6 * layer.weight.data.stored_bytes
    assert torch.equal(upper.dequantize(), decoded[:200])
    save_file({"weight": layer.weight.data}, tmp_path / "weight.safetensors")
    save_file({"upper": upper}, tmp_path / "upper.safetensors")
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    loaded = load_file(tmp_path / "weight.safetensors") | load_file(tmp_path / "upper.safetensors")
    assert torch.equal(loaded["weight"].dequantize(), decoded)
    assert torch.equal(loaded["upper"].dequantize(), decoded[:200])
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(state["weight"].dequantize(), decoded)
    many = torch.randn(64, 256, generator=generator)
    torch.testing.assert_close(
        nn.functional.linear(many, layer.weight), many @ decoded.T, rtol=1e-4, atol=1e-4
    )
    half = torch.randn(3, 256, generator=generator).bfloat16()
    torch.testing.assert_close(
        nn.functional.linear(half, layer.weight.data.bfloat16()),
        half @ decoded.bfloat16().T,
        rtol=2e-2,
        atol=2e-1,
    )


def test_lossless_matrices_are_not_sorted(query: Tensor) -> None:
    tensor = CodecTensor.from_hp(query, codec_weight_only("lossless"))
    head = tensor.header
    data = bytes(tensor.qdata.numpy())
    payloads, outliers = [], []
    for index, start in enumerate(head.offsets.tolist()):
        size, more = head.tiles[index]["payload_size"], head.tiles[index]["outliers_size"]
        payloads.append(data[start : start + size])
        outliers.append(data[start + size : start + size + more])
    forged = container.pack(
        codec=head.codec,
        dtype=head.dtype,
        shape=(head.rows, head.cols),
        bases=(head.row_base, head.col_base),
        snr_db=head.snr_db,
        vectors_crc=head.vectors_crc,
        private=head.private,
        payloads=payloads,
        outliers=outliers,
        units=head.tiles["unit"].tolist(),
        order=SORTED_COLUMNS,
    )
    qdata = torch.frombuffer(bytearray(forged), dtype=torch.uint8)
    with pytest.raises(CodecError, match="are sorted: allowed: unsorted"):
        open_matrix(qdata, tensor.scale, tensor.zero_point, tensor.act_pre_scale)


def test_a_tile_alone_is_its_rows_of_the_whole(query: Tensor) -> None:
    tensor = coded(query, "h264")
    matrix = open_matrix(tensor.qdata, tensor.scale, tensor.zero_point, tensor.act_pre_scale)
    decoded = tensor.dequantize()
    stored = matrix.stored()

    def tile(index: int) -> Tensor:
        block = matrix.header.blocks[index]
        out = torch.empty(block.rows, block.cols)
        _decode_tile(matrix, stored, index, out)
        return out

    with ThreadPoolExecutor(2) as pool:
        tiles = list(pool.map(tile, range(len(matrix.header.tiles))))
    assert torch.equal(torch.cat(tiles), decoded)
