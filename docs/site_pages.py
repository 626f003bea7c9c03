"""Hooks of MkDocs: pages that do not lie in docs/, and sections of the README in the first page.

The same files are read where the sources are, and there links lead from folder to folder of the
repository. Here docs/ is the root of the site.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "studies/*.md", "examples/cpp/README.md")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)[^)#\s]+")
SECTION = re.compile(r"<!-- README: (.+) -->")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put sections of the README in their places, and turn links to those of the site."""
    name = page.file.src_uri
    is_outside = any(Path(name).match(pattern) for pattern in OUTSIDE)
    markdown = _with_site_links(markdown, name if is_outside else f"docs/{name}", name)
    return SECTION.sub(
        lambda match: _with_site_links(readme_section(match[1]), "README.md", name), markdown
    )


def readme_section(title: str) -> str:
    """The text below a heading of the README.

    Raises:
        ValueError: there is no such heading.
    """
    for part in re.split(r"^## ", (ROOT / "README.md").read_text(), flags=re.MULTILINE):
        head, _, text = part.partition("\n")
        if head.removeprefix("# ") == title:
            return text.strip()
    raise ValueError(f"README.md has no section {title!r}")


def _with_site_links(markdown: str, source: str, page: str) -> str:
    """Turn links of a file of the repository, relative to it, to links of a page of the site."""

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[0]))
        return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(page) or ".")

    return LINK.sub(link, markdown)
