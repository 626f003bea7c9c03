"""The container: layout, checksums, and that no damaged byte passes."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchcodec_weights import CodecError, CodecTensor, codec_weight_only
from torchcodec_weights.format.container import (
    Outliers,
    crc32c,
    pack,
    pack_outliers,
    parse_header,
    read_tile,
    unpack_outliers,
)

EXAMPLE = Path(__file__).parent.parent / "docs" / "bitstream.md"


def example() -> bytes:
    """The container of docs/bitstream.md: 2 x 3 weights, two tiles, one outlier."""
    return bytes(
        pack(
            codec="demo",
            dtype="bfloat16",
            shape=(2, 3),
            bases=(0.5, 2.0),
            snr_db=12.5,
            vectors_crc=crc32c(b"\x7f", b"\x7f"),
            private=b"\x01\x02",
            payloads=[b"\xaa\xbb\xcc", b"\xdd"],
            outliers=[
                b"",
                pack_outliers(Outliers(np.array([1]), np.array([0x80, 0x3F], np.uint8))),
            ],
            units=[0.25, 0.25],
        )
    )


def test_crc_is_castagnoli() -> None:
    # The check value of RFC 3720's CRC-32C for the digits 1 to 9.
    assert crc32c(b"123456789") == 0xE3069283


def test_documented_example_is_what_pack_writes() -> None:
    lines = EXAMPLE.read_text().splitlines()
    dump = [line.split("|")[0].split()[1:] for line in lines if line.startswith("    0")]
    assert bytes.fromhex("".join(byte for line in dump for byte in line)) == example()


def test_header_fields() -> None:
    header = parse_header(memoryview(example()))
    assert (header.codec, header.dtype, header.rows, header.cols) == ("demo", "bfloat16", 2, 3)
    assert (header.row_base, header.col_base, header.snr_db) == (0.5, 2.0, 12.5)
    assert header.private == b"\x01\x02"
    assert [(b.first_row, b.end_row) for b in header.blocks] == [(0, 1), (1, 2)]
    payload, outliers = read_tile(memoryview(example()), header, 1)
    assert payload == b"\xdd"
    assert outliers.positions.tolist() == [1]
    assert outliers.values.tobytes() == b"\x80\x3f"


def test_every_flipped_bit_is_found() -> None:
    good = example()
    for position in range(8 * len(good)):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        with pytest.raises(CodecError):
            _read_all(bytes(bad))


def test_every_cut_and_every_extension_is_found() -> None:
    good = example()
    for size in range(len(good)):
        with pytest.raises(CodecError):
            _read_all(good[:size])
    with pytest.raises(CodecError, match="bytes long"):
        _read_all(good + b"\0")


def test_newer_format_says_what_to_do() -> None:
    newer = bytearray(example())
    struct.pack_into("<H", newer, 4, 4)
    with pytest.raises(CodecError, match=r"newer than 3.*upgrade torchcodec_weights"):
        parse_header(memoryview(newer))


@given(st.binary(max_size=200))
def test_any_bytes_end_in_an_error(data: bytes) -> None:
    with pytest.raises(CodecError):
        _read_all(data)


@given(st.sets(st.integers(0, 300_000), max_size=50), st.sampled_from([2, 4]))
def test_outliers_round_trip(positions: set[int], itemsize: int) -> None:
    where = np.array(sorted(positions), np.int64)
    values = np.arange(itemsize * len(where), dtype=np.uint8)
    back = unpack_outliers(pack_outliers(Outliers(where, values)), itemsize, 300_001)
    assert back.positions.tolist() == where.tolist()
    assert back.values.tobytes() == values.tobytes()


@given(st.binary(max_size=60), st.integers(1, 1000))
def test_damaged_outliers_stay_inside_the_tile(data: bytes, weights: int) -> None:
    try:
        positions = unpack_outliers(data, 4, weights).positions
    except CodecError:
        return
    assert all(0 <= position < weights for position in positions)
    assert all(np.diff(positions) > 0)


@pytest.fixture(params=["h264", "ectcq"])
def coded(request: pytest.FixtureRequest, query: Tensor) -> CodecTensor:
    """A real weight, by a codec that is decoded tile by tile and by one decoded whole."""
    return CodecTensor.from_hp(query, codec_weight_only(request.param, bits=3, preset="fast"))


@pytest.mark.parametrize(
    "region",
    ["magic", "version", "size", "codec", "tile table", "header crc", "first tile", "last"],
)
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damage_in_a_real_bitstream(coded: CodecTensor, region: str, damage: str) -> None:
    header = coded.header
    first = int(header.offsets[0])
    position = {
        "magic": 0,
        "version": 4,
        "size": 12,
        "codec": 52,
        "tile table": first - 10,
        "header crc": first - 2,
        "first tile": first + 100,
        "last": header.total_size - 1,
    }[region]
    data = coded.qdata.clone()
    if damage == "flip":
        data[position] ^= 16
    else:
        data = data[:position].clone()
    broken = _with(coded, qdata=data)
    with pytest.raises(CodecError):
        broken.dequantize()
    with pytest.raises(CodecError):
        torch.nn.functional.linear(torch.ones(1, 384), broken)


@pytest.mark.parametrize("name", ["scale", "act_pre_scale"])
def test_damage_beside_the_container(coded: CodecTensor, name: str) -> None:
    codes = getattr(coded, name).clone()
    codes[3] ^= 1
    with pytest.raises(CodecError, match="corrupt or of another matrix"):
        _with(coded, **{name: codes}).dequantize()


def _with(coded: CodecTensor, **changed: torch.Tensor) -> CodecTensor:
    parts = {name: getattr(coded, name) for name in coded.tensor_data_names} | changed
    return CodecTensor(logical_shape=[384, 384], logical_dtype=torch.float32, **parts)


def _read_all(data: bytes) -> None:
    header = parse_header(memoryview(data))
    for index in range(len(header.tiles)):
        read_tile(memoryview(data), header, index)
