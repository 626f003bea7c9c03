"""The files of a model's directory, and its checks before they are read."""

import json
import os
import re
from pathlib import Path

from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.layout import parse_json

# Names of the Hugging Face cache's blobs: SHA-1 of git, SHA-256 of LFS.
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

_INDEX = "model.safetensors.index.json"

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


def safetensors_files(path: Path) -> list[Path]:
    """The safetensors files of a directory, or the one that `path` is; else none.

    Raises:
        ValueError: `compress` has not finished the directory yet.
        CodecError: its index is malformed.
    """
    if path.is_dir():
        check_finished(path)
        return folder_files(path) if list(path.glob("*.safetensors")) else []
    return [path] if path.is_file() and path.suffix == ".safetensors" else []


def folder_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory, sorted.

    They are those that `model.safetensors.index.json` names, or all if there is no index.

    Raises:
        CodecError: the index is malformed or names a file outside.
        ValueError: a link in the directory leads out of it (`check_folder`), or `compress` has not
            finished it yet.
        FileNotFoundError: there is no safetensors file.
    """
    check_folder(folder)
    check_finished(folder)
    index = folder / _INDEX
    if index.exists():
        contents = parse_json(index.read_bytes(), str(index), dict)
        files = contents.get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise CodecError(f"{index}: weight_map: needed: names of weights to names of files")
        for name in files.values():
            if name in ("", ".", "..") or Path(name).name != name:
                raise CodecError(
                    f"{index}: weight_map has {name!r}: allowed: files beside the index"
                )
        paths = sorted({folder / name for name in files.values()})
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no safetensors file")
    return paths
