"""Files: what is saved here opens in another process, and what was saved long ago opens here."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ALL, fastest
from torch import Tensor, nn

from torchcodec_weights import CodecTensor, codec_weight_only, quantize_

FORMAT_1 = Path(__file__).parent / "data" / "format1.pt"

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


def _digest(weight: Tensor) -> str:
    return hashlib.sha256(weight.numpy().tobytes()).hexdigest()


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
    _write()
