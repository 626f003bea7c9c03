"""The decoders under AddressSanitizer and UndefinedBehaviorSanitizer, on damaged bytes."""

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from torchcodec_weights.codecs.base import EncoderSettings
from torchcodec_weights.codecs.ectcq import ECTCQ
from torchcodec_weights.codecs.ectcq.model import tables_of

HERE = Path(__file__).parent
NATIVE = HERE.parent / "torchcodec_weights" / "codecs" / "ectcq" / "native"
X86 = {
    "decode_avx2.cpp": ["-mavx2", "-mfma"],
    "search_avx2.cpp": ["-mavx2", "-mfma"],
    "decode_avx512.cpp": ["-mavx512f", "-Wno-maybe-uninitialized"],
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_no_byte_is_touched_that_is_not_the_decoders(tmp_path: Path) -> None:
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags = ["-std=c++17", "-O1", "-g", "-Wno-psabi", "-fsanitize=address,undefined"]
    flags += ["-fno-sanitize-recover=all", f"-I{NATIVE}", *(["-DECTCQ_X86"] if x86 else [])]
    objects = []
    for source in [HERE / "fuzz_ectcq.cpp", *sorted(NATIVE.glob("*.cpp"))]:
        special = X86.get(source.name)
        if special is not None and not x86:
            continue
        objects.append(str(tmp_path / f"{source.stem}.o"))
        command = ["g++", *flags, *(special or []), "-c", str(source), "-o", objects[-1]]
        subprocess.run(command, check=True)
    program = str(tmp_path / "fuzz")
    subprocess.run(
        ["g++", "-fsanitize=address,undefined", "-pthread", *objects, "-o", program], check=True
    )

    tile = np.random.default_rng(0).standard_normal((9, 71), np.float32)
    codec, settings = ECTCQ(), EncoderSettings("fast")
    private = codec.prepare([tile], 0.5, settings)
    coded = codec.encode(tile, 0.5, float(np.abs(tile).max()), private, settings)
    case = tmp_path / "case"
    case.write_bytes(bytes(tables_of(private, coded.unit)) + coded.payload)
    run = subprocess.run([program, str(case), str(tile.size)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "results" in run.stdout
