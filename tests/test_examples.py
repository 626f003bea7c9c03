"""The example that `make demo` runs, with one codec, at one rate, on less text."""

import re
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


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
