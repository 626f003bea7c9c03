"""docs/upstream.md: its programs still print what it says."""

import re
from contextlib import redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import pytest
from packaging.version import Version

TEXT = (Path(__file__).parent.parent / "docs" / "upstream.md").read_text()
FIRST, *SECTIONS = re.split(r"^## ", TEXT, flags=re.MULTILINE)
PROGRAM = r"```python\n(.*?)```"


@pytest.mark.skipif(
    Version(version("transformers")) < Version("5.24"), reason="the page is of a later version"
)
@pytest.mark.parametrize("section", SECTIONS, ids=[text.splitlines()[0] for text in SECTIONS])
def test_program(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    programs = re.findall(PROGRAM, FIRST, re.DOTALL) + re.findall(PROGRAM, section, re.DOTALL)
    (expected,) = re.findall(r"^    (\S.*)\n\n(?=Expected)", section, re.MULTILINE)
    printed = StringIO()
    try:
        with redirect_stdout(printed):
            exec("".join(programs), {})
        result = printed.getvalue().strip()
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    assert result.startswith(expected)
