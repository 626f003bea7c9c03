"""The documents: every block of code in them runs, and their site builds.

A comment above a block says what it needs, `<!-- test: setup=NAME -->` with a function of `SETUPS`,
or why it is not run, `<!-- test: skip, REASON -->`. Blocks of a page run in order, with the names
of those before, in one folder. Programs of examples/, included or called, are run by
test_examples.py, with small models.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_examples import TESTED

import torchcodec_weights
from torchcodec_weights import policy
from torchcodec_weights.cli import main
from torchcodec_weights.evaluation import models
from torchcodec_weights.evaluation.models import load_tiny

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^ *<!-- test: (?P<mark>[^\n]+) -->\n)?^(?P<indent> *)```(?P<language>\w+)\n"
    r"(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
# Commands that are indented instead of fenced would not be found.
UNFENCED = re.compile(r"(?:^|\n)\n {4}((?:torchcodec-weights|python|pip|make|torchrun)\b.*)")
INCLUDED = re.compile(r'\s*--8<-- "examples/([\w/.]+)"\s*')
# Blocks that are not run. A number, so that one more is decided on and not overlooked.
SKIPPED = 25


class Block(NamedTuple):
    """A block of code.

    Attributes:
        line: of its first line of code in the page.
        language: as its fence says.
        mark: the comment above it; empty if there is none.
        code: without the indentation of the block.
    """

    line: int
    language: str
    mark: str
    code: str


def blocks(page: Path) -> Iterator[Block]:
    """Those in Python and of the shell."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        if match["language"] in ("python", "sh"):
            line = text.count("\n", 0, match.start("code")) + 1
            code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
            yield Block(line, match["language"], match["mark"] or "", code)


def tiny_folder(_: pytest.MonkeyPatch) -> dict[str, Any]:
    """A small model in the folder MODEL, a text in my.txt, and nothing in OUT yet."""
    from transformers import AutoModelForCausalLM, TorchAoConfig

    model, tokenizer = load_tiny()
    shutil.rmtree("OUT", ignore_errors=True)
    for part in (model, tokenizer):
        part.save_pretrained("MODEL")
    Path("my.txt").write_text("Any text does.\n" * 20)
    return {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "TorchAoConfig": TorchAoConfig,
        "name": "MODEL",
        "folder": "saved",
    }


def tiny_model(_: pytest.MonkeyPatch) -> dict[str, Any]:
    """A small model in `model` that writes no long texts."""
    model, _ = load_tiny()
    model.config.max_position_embeddings = 32
    return {"model": model}


def tiny_smollm2(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A small model in the place of SmolLM2 on the rest of a page: the demo encodes SmolLM2."""
    monkeypatch.setattr(models, "load_smollm2", load_tiny)
    return {}


SETUPS: dict[str, Callable[[pytest.MonkeyPatch], dict[str, Any]]] = {
    "small": tiny_smollm2,
    "model": tiny_model,
    "folder": tiny_folder,
}


@pytest.fixture
def all_codecs_allowed() -> Iterator[None]:
    """And again, whatever a page set for the whole process."""
    allowed = policy._codecs
    yield
    policy._set_codecs(allowed)


@pytest.mark.usefixtures("all_codecs_allowed", "forgotten_choices")
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(blocks(page))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        kind, _, value = block.mark.partition(", " if block.mark.startswith("skip") else "=")
        if kind == "skip":
            assert value, f"{page.name}, line {block.line}: a skip without a reason"
            continue
        if included := INCLUDED.fullmatch(block.code):
            assert included[1] in TESTED, f"{included[1]} is not run by test_examples.py"
            continue
        assert kind in ("", "setup"), f"{page.name}, line {block.line}: {block.mark!r}"
        if kind:
            names |= SETUPS[value](monkeypatch)
        if block.language == "python":
            # Lines as in the page, for tracebacks.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line, comments=True) or ["torchcodec-weights"]
            where = f"{page.name}, line {block.line}: {line}"
            if program == "python" and arguments[0].startswith("examples/"):
                assert arguments[0].removeprefix("examples/") in TESTED, where
                continue
            assert program == "torchcodec-weights", f"{where}: to be marked `test: skip, REASON`"
            assert not arguments or main(arguments) == 0, where


def test_what_is_not_run_is_counted() -> None:
    marks = [block.mark for page in PAGES for block in blocks(page)]
    skipped = [mark for mark in marks if mark.startswith("skip")]
    assert len(skipped) == SKIPPED, "\n".join(skipped)
    for page in PAGES:
        text = page.read_text()
        fenced = [*BLOCK.finditer(text)]
        assert 2 * len(fenced) == text.count("```"), f"{page.name}: a fence names no language"
        assert not UNFENCED.findall(text), f"{page.name}: to be fenced as sh"


def test_the_site_builds_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # an advertisement
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    reference = (tmp_path / "api.html").read_text()
    for name in torchcodec_weights.__all__:
        assert f'id="torchcodec_weights.{name}"' in reference, f"docs/api.md lacks {name}"
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link)[^>]*?(?:src|href)="(\w+:[^"]*)', page.read_text()
        )
        assert not [address for address in loaded if not address.startswith("data:")], page.name
