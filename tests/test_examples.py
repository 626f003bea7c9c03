"""The examples: `make demo` with the fastest codec, others with a small model."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import tiny_llama, word_tokenizer

from torchcodec_weights.codecs.common import compiled
from torchcodec_weights.evaluation.data import WIKITEXT2, data_file

EXAMPLES = Path(__file__).parent.parent / "examples"
DEMO = EXAMPLES / "demo.py"


def test_demo(tmp_path: Path) -> None:
    command = [sys.executable, str(DEMO), "--codecs", "h264", "--bits", "4", "--tokens", "1023"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = re.findall(r"^(.+) \(perplexity ([\d.]+)\):\n  (.+)$", run.stdout, re.MULTILINE)
    assert [name for name, _, _ in found] == ["dense", "h264, 4 bits", "reloaded"]
    assert found[1][1:] == found[2][1:]
    dense, encoded = float(found[0][1]), float(found[1][1])
    assert dense < encoded < 1.3 * dense
    assert all("Paris" in answer for _, _, answer in found)
    table = re.findall(r"^(.+?) +([\d.]+) MB +([\d.]+) +([\d.]+)$", run.stdout, re.MULTILINE)
    assert [row[3] for row in table] == [found[0][1], found[1][1]]
    assert 3.97 < float(table[1][2]) <= 4
    saved = tmp_path / "demo_output"
    sizes = [(saved / name).stat().st_size for name in ("dense.pt", "h264-4bit.pt")]
    assert [f"{size / 1e6:.1f}" for size in sizes] == [row[1] for row in table]
    assert sizes[1] < 0.45 * sizes[0]
    assert (saved / "report.html").stat().st_size < 500_000


def test_lora(tmp_path: Path) -> None:
    words = Counter(data_file(WIKITEXT2).read_text()[:100_000].split()).most_common(509)
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "tiny")
    word_tokenizer([word for word, _ in words]).save_pretrained(tmp_path / "tiny")
    command = [sys.executable, EXAMPLES / "lora.py", "tiny", "--bits", "3", "--steps", "12"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    held_out = dict(re.findall(r"([\w ]+): held-out loss ([\d.]+)", run.stdout))
    assert list(held_out) == ["dense", "encoded", "with the adapter", "loaded again"]
    assert held_out["loaded again"] == held_out["with the adapter"]
    assert float(held_out["with the adapter"]) < float(held_out["encoded"])
    assert len(re.findall(r"^step +\d+  loss", run.stdout, re.MULTILINE)) == 12
    assert "<svg" in (tmp_path / "lora_output" / "loss.svg").read_text()


def module_of(path: Path) -> ModuleType:
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.feature(
    "Compiling and exporting", "AOTInductor", "run in a C++ program without Python: examples/cpp"
)
def test_a_program_without_python_generates_the_same(tmp_path: Path) -> None:
    found = Path(torch.utils.cmake_prefix_path) / "Torch" / "TorchConfig.cmake"
    if not found.is_file() or not shutil.which("cmake") or not shutil.which("c++"):
        pytest.skip("needs cmake, a C++ compiler and a torch that comes with its headers")
    package = module_of(EXAMPLES / "cpp" / "package.py")
    model = tiny_llama().eval()
    package.encode(model, 3, "fast")
    package.package(model, [5, 17, 300, 42], 12, tmp_path)

    build = str(tmp_path / "build")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (
        ["cmake", "-S", str(EXAMPLES / "cpp"), "-B", build, prefix],
        ["cmake", "--build", build],
    ):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    arguments = [f"{build}/generate", "model.pt2", "prompt.txt", "12"]
    run = subprocess.run(
        [*arguments, str(compiled.LIBRARY)], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == (tmp_path / "expected.txt").read_text().split()
    maps = subprocess.run(["ldd", f"{build}/generate"], capture_output=True, text=True)
    assert "libpython" not in maps.stdout
    assert "libtorch_python" not in maps.stdout

    run = subprocess.run([*arguments, "nothing.so"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert "nothing.so" in run.stderr
