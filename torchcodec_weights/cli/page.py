"""The option `--html`: pages that commands write."""

from pathlib import Path

from torchcodec_weights.system.files import unfinished


def check_page(path: Path) -> None:
    """Raise ValueError where a page cannot be written, before any work."""
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise ValueError(f"--html={str(path)!r}: allowed: a file in a directory that exists")


def write_page(path: Path, page: str) -> None:
    """Write a page in one step; it replaces what has its name.

    Raises:
        OSError: `path` cannot be written.
    """
    with unfinished(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
