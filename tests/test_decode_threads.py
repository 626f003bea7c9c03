"""Threads that decoding leaves behind, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, threading, time
from pathlib import Path

import torch

from torchcodec_weights import CodecTensor, codec_weight_only
from torchcodec_weights.decoders import cpu

def threads():
    return len([*Path("/proc/self/task").iterdir()])

torch.set_num_threads(2)
torch.ones(10**6).add_(1)  # starts OpenMP's threads
coded = CodecTensor.from_hp(
    torch.randn(4096, 256), codec_weight_only(sys.argv[1], bits=4, preset="fast")
).to(torch.bfloat16)
together = threading.Barrier(2)
cpu.for_each(lambda number: together.wait(), 2, 2)  # starts those of the pool
before = threads()
torch.nn.functional.embedding(torch.randint(4096, (8000,)), coded)
coded.dequantize()
assert threads() == before, (threads(), before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
@pytest.mark.parametrize("codec", ["ectcq", "h264"])
def test_decoding_starts_no_threads_of_openmp_beside_pytorchs(codec: str) -> None:
    """With more than there are processors, OpenMP makes all of them sleep while they wait."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, codec], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
