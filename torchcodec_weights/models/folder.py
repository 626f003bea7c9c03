"""Checks of a model's directory before its files are read."""

import json
import os
import re
from pathlib import Path

# Names of the Hugging Face cache's blobs: SHA-1 of git, SHA-256 of LFS.
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

UNFINISHED = "torchcodec_weights_unfinished"
"""Key in the `config.json` of a directory that `compress` has not finished yet."""


def unfinished_message(folder: Path) -> str:
    """What is said of such a directory. It is its model type, so that transformers says it too."""
    return (
        f"{folder} is not whole yet: torchcodec-weights compress is at work or was stopped; the "
        "same command again goes on"
    )


def check_finished(folder: Path) -> None:
    """Raise ValueError for the directory of an output that `compress` has not finished."""
    path = folder / "config.json"
    try:
        table = json.loads(path.read_bytes()) if path.is_file() else None
    except (ValueError, RecursionError):
        return  # for the reader to tell
    if isinstance(table, dict) and UNFINISHED in table:
        raise ValueError(unfinished_message(folder))


def check_folder(folder: Path) -> None:
    """Refuse a directory with links that lead out of it, or with files that may block a reader.

    Files of a model are copied to the output of a command, which may be published. A link out of
    the directory of a stranger's model would copy a private file. Allowed are links within the
    directory and, as in the Hugging Face cache, links from `snapshots/<revision>` to files in
    `blobs` beside `snapshots`. Hidden files and directories are not checked, as nothing reads them.

    Args:
        folder: a model's directory.

    Raises:
        ValueError: a link leads out of the directory, or a file is a FIFO, a socket or a device;
            names it.
    """
    root = Path(os.path.realpath(folder))
    for parent, directories, files in os.walk(root):
        directories[:] = [name for name in directories if not name.startswith(".")]
        for name in sorted([*directories, *files]):
            path = Path(parent, name)
            if name.startswith("."):
                continue
            if path.is_symlink():
                target = Path(os.path.realpath(path))
                if not (target.is_relative_to(root) or _is_blob(target, root)):
                    raise ValueError(
                        f"{str(path)!r} is a link to {str(target)!r}: allowed: links to places in "
                        f"{str(folder)!r}"
                    )
            if path.exists() and not (path.is_dir() or path.is_file()):
                raise ValueError(
                    f"{str(path)!r} is a FIFO, a socket or a device: allowed: files, directories "
                    "and links to them"
                )


def _is_blob(target: Path, root: Path) -> bool:
    """Whether `target` is a blob of the cached repository whose snapshot contains `root`."""
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots":
            # Not resolved again: a link in the place of `blobs` may lead anywhere.
            blobs = folder.parent.parent / "blobs"
            return target.parent == blobs and _BLOB.fullmatch(target.name) is not None
    return False
