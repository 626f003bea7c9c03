"""The examples: `make demo` with the fastest codec, others with a small model."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from conftest import tiny_llama, word_tokenizer

from torchcodec_weights.evaluation.data import WIKITEXT2, data_file

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
