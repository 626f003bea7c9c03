"""The option `--html`: pages that commands write."""

from pathlib import Path


def check_page(path: Path) -> None:
    """Raise ValueError where a page cannot be written, before any work."""
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise ValueError(f"--html={str(path)!r}: allowed: a file in a directory that exists")
