"""What opening and using a file takes at most: 64 MB and four times what it stores or is dense."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import coded
from hostile import Parts, parts_of, stored, weight_of

from torchcodec_weights import CodecTensor, codec_weight_only

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs"
)

ALLOWED = 64 * 2**20
PROGRAM = Path(__file__).with_name("memory_of.py")


def coded_as(codec: str, weight: torch.Tensor) -> CodecTensor:
    if codec == "lossless":
        return CodecTensor.from_hp(weight, codec_weight_only("lossless"))
    return coded(weight, codec)


def unbounded(parts: Parts) -> None:
    """A matrix of 8 GB in one tile of some hundred bytes, and a window of 64 x 64."""
    parts.rows = parts.cols = 46_340


def many_tiles(parts: Parts) -> None:
    """Two million tiles, nearly all of them left out: 32 MB of table."""
    parts.rows = 2**21
    parts.tiles = parts.tiles[:1] + [(b"", b"", 0.0)] * (2**21 - 1)


def many_outliers(parts: Parts) -> None:
    """Sixteen million words that place nothing: 32 MB."""
    payload, _, unit = parts.tiles[0]
    words = np.full(2**24, 0xFFFF, "<u2")
    parts.tiles[0] = payload, struct.pack("<I", len(words)) + words.tobytes(), unit


def all_outliers(parts: Parts) -> None:
    """Every weight of a tile of 4 million is an outlier."""
    parts.rows, parts.cols = 2**11, 2**11
    payload, _, unit = parts.tiles[0]
    words = np.zeros(2**22, "<u2")
    values = np.ones(2**22, np.float32).tobytes()
    parts.tiles[0] = payload, struct.pack("<I", len(words)) + words.tobytes() + values, unit


def large_private(parts: Parts) -> None:
    parts.private = bytes(2**25)


LIES = (unbounded, many_tiles, many_outliers, all_outliers, large_private)


@pytest.mark.parametrize("codec", ["ectcq", "lossless", "h264"])
def test_memory(tmp_path: Path, codec: str) -> None:
    rng = torch.Generator().manual_seed(0)
    small = coded_as(codec, torch.randn(64, 64, generator=rng))
    large = torch.randn(1024, 4096, generator=rng)
    paths = [stored(tmp_path / "small", small), stored(tmp_path / "large", coded_as(codec, large))]
    for change in LIES:
        parts = parts_of(small)
        parts.scale = parts.act_pre_scale = np.full(1, 127, np.uint8)
        change(parts)
        parts.attributes["logical_shape"] = [64, 64]
        parts.attributes["window"] = [0, 64, 0, 64] if parts.rows > 64 else None
        paths.append(stored(tmp_path / change.__name__, weight_of(parts)))
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, paths)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines[:2]] == ["used", "refused:"]
    for path, line in zip(paths[1:], lines, strict=True):
        size = large.nbytes if path.name == "large" else path.stat().st_size
        taken = int(line.split()[0])
        assert taken <= ALLOWED + 4 * size, f"{path.name}: {taken:,} bytes for {size:,}: {line}"
