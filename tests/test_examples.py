"""The programs of examples/ with small models, and what `make demo` runs with the fastest codec."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
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
# Arguments, and what they print.
PROGRAMS = {
    "compress_hf.py": (
        "--model tiny",
        r"before: +\d.*\nafter: .*\n.*France is[\s\S]*\n14 weights: .*bits",
    ),
    "calibrate_text.py": (
        f"--model tiny --sequences 2 --length 64 --text {EXAMPLES.parent / 'README.md'}",
        r"dense +\d+\.\d\n.*everywhere .* at [12]\.\d+ bits.*\n.*your text .* at [12]\.\d+ bits",
    ),
    "search.py": ("", r"\d+ weights: .*\n\n.*\n\n.*\n +0\.\d+ +0\.\d+  The cat has not left"),
    "speech.py": ("", r"\d+ weights: .*\ndense +tokens: \[\d.*\nencoded +tokens: \[\d"),
    "tensor_parallel.py": ("--model tiny", r"process [01] has "),
    "ffplay.py": (
        "--codec hevc",
        r"tile\.265: 384 x 384 weights in .* [23]\.\d+ bits.*\ntile\.png: [\d,]+",
    ),
    "own_codec/compare.py": ("", r"deadzone +2 +[12]\.\d+ .* dB\nhevc .*\nectcq"),
}
# All that tests here run: test_docs.py takes them as tested.
TESTED = {
    *PROGRAMS,
    "demo.py",
    "lora.py",
    "own_codec/deadzone.py",
    "own_codec/pyproject.toml",
    "serve.py",
}


# These start processes, or need a codec that is installed when their process begins.
APART = ("own_codec/compare.py", "tensor_parallel.py")


def run(tmp_path: Path, program: str, *arguments: str) -> str:
    """What a program prints, run in an empty folder."""
    command = [sys.executable, str(EXAMPLES / program), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run_here(program: str, *arguments: str) -> str:
    """The same in the current folder and process, where PyTorch is imported already."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "argv", [program, *arguments])
        runpy.run_path(str(EXAMPLES / program), run_name="__main__")
    return printed.getvalue()


@pytest.mark.parametrize("program", PROGRAMS)
def test_example(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, expected = PROGRAMS[program]
    monkeypatch.chdir(tmp_path)
    if program.startswith("own_codec"):
        install_own_codec(tmp_path, monkeypatch)
    if program in APART:
        printed = run(tmp_path, program, *arguments.split())
    else:
        printed = run_here(program, *arguments.split())
    assert re.search(expected, printed), printed
    if program == "tensor_parallel.py":
        found = re.findall(r"has ([\d,]+) bytes of ([\d,]+) .* differ by (\S+)", printed)
        assert len(found) == 2, printed
        for part, whole, difference in found:
            # Half of the two that are divided by rows, and all of the one by columns.
            assert int(part.replace(",", "")) < 0.7 * int(whole.replace(",", ""))
            assert float(difference) < 1e-3


def install_own_codec(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `pip install examples/own_codec` does, without its build backend."""
    source = EXAMPLES / "own_codec"
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    ((group, codecs),) = project["entry-points"].items()
    (site / "deadzone.py").write_bytes((source / "deadzone.py").read_bytes())
    folder = site / "deadzone_codec-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1.0\n"
    )
    lines = [f"[{group}]", *(f"{name} = {value}" for name, value in codecs.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def test_serve(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "serve.py"), "--model", "tiny", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            address = server.stdout.readline().strip()
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with direct.open(address, data=b"The capital of France is", timeout=60) as answer:
                assert answer.read().startswith(b"The capital of France is")
            with direct.open(address, timeout=60) as answer:
                assert re.match(rb"14 weights: .*\nProcess: [\d,]+ bytes", answer.read())
            with pytest.raises(urllib.error.HTTPError, match="400: a prompt has 1 to"):
                direct.open(address, data=b"", timeout=60)
        finally:
            server.terminate()


def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code cells in order, on the small model; and that its outputs are stored."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "compress_hf.ipynb").read_text())
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    names: dict[str, object] = {}
    small = sources[0].replace("load_smollm2", "load_tiny")
    assert small != sources[0]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for number, source in enumerate([small, *sources[1:]], 1):
            exec(compile(source, f"cell {number}", "exec"), names)
    assert "bits per weight" in printed.getvalue()
    assert any(cell["outputs"] for cell in cells)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]


def test_demo(tmp_path: Path) -> None:
    command = [sys.executable, str(DEMO), "--codecs", "h264", "--bits", "4"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = re.findall(r"^(\w.+?)(?: \(perplexity ([\d.]+)\))?:\n  (.+)$", run.stdout, re.MULTILINE)
    assert [name for name, _, _ in found] == ["dense", "h264, 4 bits", "reloaded"]
    assert found[1][2] == found[2][2]
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
