"""Files: what is saved here opens in another process, and what was saved long ago opens here."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ALL, IMAGE, VIDEO, fastest
from torch import Tensor, nn

from torchcodec_weights import CodecTensor, codec_weight_only, quantize_
from torchcodec_weights.format import container
from torchcodec_weights.matrix.importance import Importance

FORMAT_1 = Path(__file__).parent / "data" / "format1.pt"
FORMAT_2 = Path(__file__).parent / "data" / "format2.pt"
FORMAT_3 = Path(__file__).parent / "data" / "format3.pt"

# What format 2 has: tiles that are blocks, in every lossy codec, with steps of their own, in slices
# and views, in every dtype. `lossless` has no blocks, so its files stay in format 1.
# SHA-256 of the decoded weights.
DIGESTS_2 = {
    "blocks ectcq": "9493fdb0d025e8c8e0cd90dc5d893596c003be86b1ff74f3b26b887843c445f8",
    "blocks vvc": "71ffd893499f49228c4bac42517ca06cd4331fc7675965aa63df9d7704eb6774",
    "blocks hevc": "853a5336c8d936b9f8903c0f8ed6967b8cb6a957402c4131223d67798f5ddf1c",
    "blocks h264": "028a70ee2805e1537f184abb65c16ebce296e273ecdcb9e2315b540e36370da2",
    "blocks av1": "17fe35c688d815ed4bb51d6a50eed86e1a8c729bedf068139e99f30d9980d8b1",
    "blocks vp9": "af630eb37a2e64cc98c20d61b0bc111bb3a6a3c68f564e471a4ba155e1b82ff6",
    "blocks jpeg": "71802ad2e39470cb889175acc469590ec421e224377d9cca16923b6f5f9214a1",
    "blocks jpeg2000": "4f51f33d8404216c40d5dbdeab101d89cfecd21e7cad7bf27a6458bcc6cd5ce7",
    "blocks htj2k": "4f51f33d8404216c40d5dbdeab101d89cfecd21e7cad7bf27a6458bcc6cd5ce7",
    "blocks jpegxl": "4f51f33d8404216c40d5dbdeab101d89cfecd21e7cad7bf27a6458bcc6cd5ce7",
    "adaptive h264": "1137544cbe36af85f534d58ca9fe74ab476c49f22c03ddfefa96c19173fce500",
    "adaptive jpegxl": "0760736ae193bb9866feee200050b09e7efe53f47e594ae717847c20eed6d212",
    "zero point": "2f48bf1d563c7bb91d40c3679b40794cde2d7ace401ae2ea2d97626b0e90fab2",
    "bfloat16": "5946125f09e9fc315a254b8c5a58dacdf726b5ea6fb1daf6e3d5bd2403dc5519",
    "float16": "500550ff81cdfacc2569217f5bca2c24246785e4d628c5a982519443d349f3dd",
    "transposed": "b31644802ec251259a1dc9356163a37a5eee210ad838a9f31288584b48f5048e",
    "slice": "7d0b009907aea670280340b9a173c40fd3556d2654dac6d597090f493b253193",
    "kernel": "dc3f60b7af72c583bb93cecca23b6a0d7ced024fe6b00f9577ba86939714fc8a",
}

# What format 3 has: rows and columns sorted, in every lossy codec, and `ectcq` by columns.
DIGESTS_3 = {
    "sorted vvc": "3fc92cab1ea26f9d663273bd0c3ed00aa70f0be5cb19d86a2732ad65a97e447a",
    "sorted hevc": "ee9cd827cc48fcb00eb8a4ac244dfee21986a900ee242c3d71c2f38fe37cf0d8",
    "sorted h264": "a2e0f13b057465875758a64e6b973b3e0dde2b4d78f0dcbf5ab17ef5e900e0e5",
    "sorted av1": "ad04cda0724970078af78ba5964c9449f9e1bf535550b95ca76dd189ca47a7da",
    "sorted vp9": "8bdf3437c2bfd2570d6215cd6286cb966086aae370ccd1067788ed2b0573625d",
    "sorted jpeg": "c3252e37d8f557700b42dea1adff38307abfdbc434dbd2db59414c412db1c171",
    "sorted jpeg2000": "1e7d946e53cb7d3293f45c0c92273f978df217549df86f4657a0f304d0dea872",
    "sorted htj2k": "c2a6ffd4e2fc12cc132de85e088f27a425e2ce5b3266490cdfba2f74c655309b",
    "sorted jpegxl": "90dc4f2f095ddcd45c2907addfd98bbf6d9a32080c1b1ac4dbdca1e6fd0c0991",
    "one class": "011578056751dfde5a903ffa41f81b9a663a91d11fd74d705698f5a4ec2352f5",
    "bfloat16": "6f3cb5e60302970bac5b8c578bcca98b9c91f30833f5784250c2f95ca239a3ac",
    "float16": "506a5c1f01e5dfb12c01e6b88c46e532a0eb29a438996fd2912f07d43d29c72f",
    "classes": "8a20b0b9059ebb2b647d0faa62b08ecba42c71f36f760ff6314c668e4f812a95",
    "part of a group": "5d6dca5f03b7ed887923abf420758742afae297c9d84c34c4a37a9ca7056663a",
    "tiles": "cb83eb5ee95fedb488ba9953f15e4bd3034f7e6b50961d977c1a671b171e74af",
    "slice": "1ff43792503b3c049383fc2a13c0689b16dcdf53a1c389dcffbdfd355a4f9c45",
}

_LOAD = """
import sys, torch
import torchcodec_weights
state = torch.load(sys.argv[1], weights_only=True)
layer = torch.nn.Linear(384, 384)
layer.load_state_dict(state, assign=True)
torch.save(layer(torch.load(sys.argv[2])), sys.argv[3])
"""


@pytest.mark.parametrize("codec", ALL)
def test_round_trip_through_another_process(codec: str, query: Tensor, tmp_path: Path) -> None:
    layer = nn.Linear(384, 384)
    layer.weight = nn.Parameter(query.clone())
    quantize_(layer, codec_weight_only(codec, bits=2, preset=fastest(codec)))
    x = torch.randn(3, 384)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 2 * query.numel() / 8 + 8000
    torch.save(x, tmp_path / "x.pt")
    paths = [str(tmp_path / name) for name in ("state.pt", "x.pt", "y.pt")]
    subprocess.run([sys.executable, "-c", _LOAD, *paths], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "y.pt"), layer(x))


@pytest.mark.parametrize("codec", ALL)
def test_files_of_format_1_decode_as_on_the_first_day(codec: str) -> None:
    """`python tests/test_formats.py` wrote a codec into data/format1.pt when the codec was new."""
    saved = torch.load(FORMAT_1, weights_only=True)
    coded = saved[codec]
    assert isinstance(coded, CodecTensor)
    assert _digest(coded.dequantize()) == saved[codec + ".sha256"]


def test_files_of_format_2_have_blocks() -> None:
    saved = torch.load(FORMAT_2, weights_only=True)
    assert saved.keys() == DIGESTS_2.keys()
    for coded in saved.values():
        assert int.from_bytes(bytes(coded.qdata[4:6].tolist()), "little") == 2
        assert coded.header.across > 1
        assert len(coded.header.tiles) > coded.header.across
    units = saved["adaptive jpegxl"].header.tiles["unit"]
    assert len(set(units.tolist())) > 1, "one step for all tiles"
    left_out = [not size for size in saved["slice"].header.tiles["payload_size"]]
    assert any(left_out)
    assert not all(left_out)
    assert saved["zero point"].zero_point is not None


@pytest.mark.parametrize("name", DIGESTS_2)
def test_files_of_format_2_decode_as_on_the_first_day(name: str) -> None:
    """Commit d43f91c wrote data/format2.pt: see `_write_2`."""
    coded = torch.load(FORMAT_2, weights_only=True)[name]
    assert isinstance(coded, CodecTensor)
    assert _digest(coded.dequantize()) == DIGESTS_2[name]


def test_format_3_s_file_has_what_the_format_has() -> None:
    saved = torch.load(FORMAT_3, weights_only=True)
    assert saved.keys() == DIGESTS_3.keys()
    columns = container.SORTED_COLUMNS
    for name, coded in saved.items():
        pictures = name.removeprefix("sorted ") in {*VIDEO, *IMAGE}
        assert coded.header.order == columns | (container.SORTED_ROWS if pictures else 0)
    assert len(saved["tiles"].header.tiles) > 1
    assert saved["classes"].header.private[1] > 1
    assert saved["slice"].header.tiles["payload_size"].min() == 0


@pytest.mark.parametrize("name", DIGESTS_3)
def test_files_of_format_3_decode_as_on_the_first_day(name: str) -> None:
    coded = torch.load(FORMAT_3, weights_only=True)[name]
    assert isinstance(coded, CodecTensor)
    assert _digest(coded.dequantize()) == DIGESTS_3[name]


def _digest(weight: Tensor) -> str:
    return hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _write_2() -> None:
    """Write data/format2.pt and print the digests: `python tests/test_formats.py 2`.

    It was run with this file copied into the tests of d43f91c. It refuses to run again, as a file
    must stay as it was written; a new feature of the format gets a new file.
    """
    assert not FORMAT_2.exists()
    weight = torch.randn(40, 56, generator=torch.Generator().manual_seed(2))
    weight[:, 5] *= 4  # outliers and several scales
    weight[22:] *= 3
    weight[7, 11] = 90

    def encoded(w: Tensor, codec: str = "ectcq", tile_steps: str = "uniform") -> CodecTensor:
        config = codec_weight_only(codec, step=0.5, tile_shape=(20, 28), tile_steps=tile_steps)
        return CodecTensor.from_hp(w, config)

    lossy = [codec for codec in ALL if codec != "lossless"]
    kernel = torch.randn(24, 9, 3, 3, generator=torch.Generator().manual_seed(3))
    saved = {
        **{f"blocks {codec}": encoded(weight, codec) for codec in lossy},
        **{f"adaptive {codec}": encoded(weight, codec, "adaptive") for codec in ("h264", "jpegxl")},
        "zero point": encoded(weight + torch.arange(40.0)[:, None]),
        "bfloat16": encoded(weight.bfloat16()),
        "float16": encoded(weight.half()),
        "transposed": encoded(weight).t(),
        "slice": encoded(weight)[3:17, 30:].contiguous(),
        "kernel": encoded(kernel),
    }
    torch.save(saved, FORMAT_2)
    for name, coded in saved.items():
        print(f'    "{name}": "{_digest(coded.dequantize())}",')


def _write_3() -> None:
    """Write data/format3.pt and print the digests, once: `python tests/test_formats.py 3`."""
    assert not FORMAT_3.exists()
    generator = torch.Generator().manual_seed(4)

    def encoded(rows: int, cols: int, codec: str, bits: float, dtype: torch.dtype) -> CodecTensor:
        weight = torch.randn(rows, cols, generator=generator)
        weight[rows // 2, cols // 3] = 90  # an outlier
        x = torch.randn(4 * cols, cols, generator=generator)
        x[:, 1:] += 0.7 * x[:, :-1].clone()
        x *= torch.randn(cols, generator=generator).exp()
        rates = torch.randn(rows, generator=generator).exp()
        importance = Importance(rates.numpy(), (x.T @ x / len(x)).numpy())
        config = codec_weight_only(codec, bits=bits, preset=fastest(codec))
        return CodecTensor.from_hp(weight.to(dtype), config.with_importance(importance, bits))

    lossy = [codec for codec in ALL if codec not in ("ectcq", "lossless")]
    wide = torch.float32
    tiles = encoded(2048, 128, "ectcq", 1.0, wide)
    saved = {
        **{f"sorted {codec}": encoded(40, 64, codec, 9.0, wide) for codec in lossy},
        "one class": encoded(40, 64, "ectcq", 6.0, wide),
        "bfloat16": encoded(40, 96, "ectcq", 6.0, torch.bfloat16),
        "float16": encoded(40, 96, "ectcq", 6.0, torch.float16),
        "classes": encoded(128, 384, "ectcq", 2.0, wide),
        "part of a group": encoded(40, 1050, "ectcq", 3.0, wide),
        "tiles": tiles,
        "slice": tiles[1500:1600].contiguous(),
    }
    torch.save(saved, FORMAT_3)
    for name, coded in saved.items():
        print(f'    "{name}": "{_digest(coded.dequantize())}",')


def _write() -> None:
    weight = torch.randn(40, 56, generator=torch.Generator().manual_seed(0))
    weight[3] += 2  # zero points, outliers and several scales
    weight[:, 5] *= 4
    weight[7, 11] = 90
    saved: dict[str, object] = torch.load(FORMAT_1, weights_only=True)
    for codec in (codec for codec in ALL if codec not in saved):
        coded = CodecTensor.from_hp(weight, codec_weight_only(codec, step=0.25))
        saved |= {codec: coded, codec + ".sha256": _digest(coded.dequantize())}
    torch.save(saved, FORMAT_1)


if __name__ == "__main__":
    if sys.argv[1:] == ["2"]:
        _write_2()
    elif sys.argv[1:] == ["3"]:
        _write_3()
    else:
        _write()
