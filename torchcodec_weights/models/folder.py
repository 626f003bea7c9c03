"""The directory of a model: what in it may be read."""

import os
import re
from pathlib import Path

# Names of the Hugging Face cache's blobs: SHA-1 of git, SHA-256 of LFS.
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def check_folder(folder: Path) -> None:
    """Refuse a directory from which reading may lead elsewhere, or never end.

    What is read of a model is copied into what is made of it, and published perhaps: a link out of
    the directory of a stranger's model would take a private file along. Links may lead to places
    in the directory, and, as in the Hugging Face cache, from `snapshots/<revision>` to files of
    `blobs` beside `snapshots`. Hidden files and directories are not looked at: nothing reads them.

    Args:
        folder: a model's directory.

    Raises:
        ValueError: a link leads out of the directory, or something in it is a FIFO, a socket or a
            device; names it.
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
    """Whether `target` is a blob of the repository of which `root` is, or lies in, a snapshot."""
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots":
            # Not resolved again: a link in the place of `blobs` may lead anywhere.
            blobs = folder.parent.parent / "blobs"
            return target.parent == blobs and _BLOB.fullmatch(target.name) is not None
    return False
