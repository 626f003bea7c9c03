"""The example that `make demo` runs, with the fastest codec."""

import re
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


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
