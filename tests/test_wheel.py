"""The wheel: what is in it, and that it works where there is no source tree."""

import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("torchcodec_weights-*.whl")
    return built


def test_contents(wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    package = {name for name in names if name.startswith("torchcodec_weights/")}
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "torchcodec_weights").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    needed = {"codecs/common/libcodecs.so", "codecs/ectcq/gpu.cu", "py.typed"}
    needed |= {"pages/page.html", "pages/page.css", "pages/model.js"}
    assert package == sources | {f"torchcodec_weights/{name}" for name in needed}
    others = {name.partition("/")[2] or name for name in names - package}
    metadata = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    assert others == metadata | {"torchcodec_weights_autoload.py", "torchcodec_weights_cli.py"}
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    called = "[torch.backends]\ntorchcodec_weights = torchcodec_weights_autoload:register"
    assert called in ZipFile(wheel).read(entry_points).decode()


def test_extras_that_are_named_are_there(wheel: Path) -> None:
    """In messages and documents; and those for users are in the README."""
    (name,) = (name for name in ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    extras = set(re.findall(r"^Provides-Extra: (.+)$", ZipFile(wheel).read(name).decode(), re.M))
    sources = [*(ROOT / "torchcodec_weights").rglob("*.py"), *(ROOT / "docs").glob("*.md")]
    readme = (ROOT / "README.md").read_text()
    texts = (readme, *(path.read_text() for path in sources))
    named = set(re.findall(r"torchcodec-weights\[(\w+)\]", "".join(texts)))
    assert {"image", "models", "url"} < named <= extras
    assert extras - {"dev"} <= set(re.findall(r"^\| `(\w+)` \|", readme, re.M))


def test_what_the_workflow_of_wheels_names_is_there() -> None:
    """cibuildwheel reads it where wheels are made, and tests do not run there on every change."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    options = table["tool"]["cibuildwheel"]
    files = re.findall(r"\{project\}/(\S+)", options["test-command"])
    files.append(options["test-environment"]["PIP_CONSTRAINT"])
    assert len(files) > 2
    assert [name for name in files if not (ROOT / name).is_file()] == []
    assert set(options["test-extras"]) <= set(table["project"]["optional-dependencies"])
    assert options["before-test"] in (ROOT / "Makefile").read_text().replace("--quiet ", "")


def test_the_first_minute_of_the_readme(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which borrows all but this package."""
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(environment)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps")
    run(*pip, wheel, cwd=elsewhere)
    site = Path(
        run(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=elsewhere
        ).strip()
    )
    # A path file of a path file is not read: an editable install out there stays out.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    save, load, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    saving = f"""
import torch
import torchcodec_weights
print(torchcodec_weights.__file__)
{save}
x = torch.randn(2, 576)
dense = load_smollm2()[0].model.layers[3].self_attn.q_proj(x)
coded = model.model.layers[3].self_attn.q_proj(x)
assert 0 < (coded - dense).norm() < 0.3 * dense.norm()
prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
torch.save(model(prompt).logits, "logits.pt")
"""
    loading = f"""
{load}
assert torch.equal(model(prompt).logits, torch.load("logits.pt"))
"""
    imported, totals = run(python, "-P", "-c", saving, cwd=elsewhere).strip().splitlines()
    assert Path(imported) == site / "torchcodec_weights" / "__init__.py"
    assert totals.startswith("210 weights")
    assert (elsewhere / "model.pt").exists()
    assert "capital of France" in run(python, "-P", "-c", loading, cwd=elsewhere)
