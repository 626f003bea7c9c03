"""What is done otherwise where a system lacks something of Linux, as macOS does."""

import os
from pathlib import Path

import numpy as np
import pytest

from torchcodec_weights.calibration.matrices import MatrixFile
from torchcodec_weights.system import memory


def test_memory_of_the_process_without_proc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = memory.resident()
    monkeypatch.setattr(memory, "_STATM", tmp_path / "statm")
    assert 0.9 * here <= memory.resident() < 100 * here


def test_room_for_statistics_without_posix_fallocate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    file = MatrixFile.temporary()
    first, second = file.append((3, 5)), file.append((700, 900))  # more than is written at once
    file.write(first)[:] = 1
    assert np.array_equal(file.read(first), np.ones((3, 5)))
    assert np.array_equal(file.read(second), np.zeros((700, 900)))
    state = os.fstat(file._file.fileno())
    assert state.st_size == first.size + second.size
    assert 512 * state.st_blocks >= state.st_size
