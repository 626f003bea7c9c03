"""A page of HTML in one file: no network, no other file, no script but our own."""

import base64
import hashlib
import html
import json
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from torchcodec_weights.system.files import unfinished
from torchcodec_weights.system.terminal import printable


def escaped(text: str) -> str:
    """Text for HTML's content and quoted attributes; what is not printable becomes an escape.

    Names come from files, perhaps from strangers. Beside markup, Unicode's bidirectional overrides
    would reorder what stands next to them.
    """
    return html.escape(printable(text))


def document(title: str, body: str, script: str = "", data: Any = None) -> str:
    """The page.

    Args:
        title: plain text.
        body: HTML.
        script: name of a file of this package with the page's script; "" for none.
        data: what the script reads from the element `data`, as JSON.

    Returns:
        HTML whose policy (CSP) allows this script, by its hash, and images within the file, so that
        a browser executes and loads nothing else.
    """
    code = _file(script) if script else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    # "</script>" within a string would end the element.
    text = "" if data is None else json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return Template(_file("page.html")).substitute(
        title=escaped(title),
        policy=f"script-src 'sha256-{digest}'" if script else "script-src 'none'",
        style=_file("page.css"),
        body=body,
        data=f'<script type="application/json" id="data">{text}</script>' if script else "",
        script=f"<script>{code}</script>" if script else "",
    )


def write_page(path: Path, page: str) -> None:
    """Write a page in one step; it replaces what has its name.

    Raises:
        OSError: `path` cannot be written.
    """
    with unfinished(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
