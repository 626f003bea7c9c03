"""The examples: what `make demo` runs, with the fastest codec, and the program without Python."""

import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import tiny_llama

from torchcodec_weights.codecs.common import compiled

EXAMPLES = Path(__file__).parent.parent / "examples"
DEMO = EXAMPLES / "demo.py"


def test_demo(tmp_path: Path) -> None:
    command = [sys.executable, str(DEMO), "--codec", "ectcq", "--preset", "fast", "--bits", "3"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    values = dict(re.findall(r"(\w+): perplexity ([\d.]+)", run.stdout))
    assert list(values) == ["Before", "After", "Reloaded"]
    assert values["After"] == values["Reloaded"]
    assert 23 < float(values["Before"]) < 24
    assert 25 < float(values["After"]) < 45
    saved = tmp_path / "demo_output"
    assert (saved / "ectcq-3bit.pt").stat().st_size < 0.37 * (saved / "dense.pt").stat().st_size


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
