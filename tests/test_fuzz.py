"""The fuzzers for some seconds each, and the files that they found ways to refuse."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import REFUSALS, use_bytes

HERE = Path(__file__).parent
CORPUS = sorted((HERE / "corpus").iterdir())


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_corpus(path: Path) -> None:
    with pytest.raises(REFUSALS):
        use_bytes(path.read_bytes())


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc and preloads libraries")
@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [(["matrix"], 15), (["matrix", "--sanitize"], 25), (["metadata"], 10)],
    ids=["matrix", "matrix under the sanitizers", "metadata"],
)
def test_some_seconds_find_nothing(arguments: list[str], seconds: int) -> None:
    if "--sanitize" in arguments and shutil.which("g++") is None:
        pytest.skip("needs g++")
    command = [sys.executable, str(HERE / "fuzz.py"), *arguments, "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " 0 findings" in done.stdout
    assert not done.stdout.startswith(f"{arguments[0]}: 0 inputs")
