"""Checks of output paths, and marks by which commands recognize their own output."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors

from torchcodec_weights.convert.card import with_fact
from torchcodec_weights.convert.work import is_placeholder
from torchcodec_weights.system.files import recover, unfinished, write_durably

# In a directory: a file with the names and sizes of all others.
_LIST = ".torchcodec_weights.json"
# In a safetensors file: an entry of its table of strings.
FILE_MARK = {"torchcodec_weights.cli": "1"}


def check_output(output: Path, source: Path | None, *, is_file: bool, force: bool) -> None:
    """Reject an output path, before any work.

    Args:
        output: to be written.
        source: what is read, if it lies on this machine.
        is_file: whether the output is a file, and not a directory.
        force: whether an output of this program may be replaced.

    Raises:
        ValueError: names the argument, its value and what is allowed.
        OSError: nothing can be written there.
    """
    what = f"OUT={str(output)!r}"
    path = output.resolve()
    origin = None if source is None else source.resolve()
    if origin and (path == origin or path in origin.parents or origin in path.parents):
        raise ValueError(f"{what}: allowed: a place that is not, holds or lies in {str(source)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"{what}: allowed: a name in a directory that exists")
    if is_file and path.suffix != ".safetensors":
        raise ValueError(f"{what}: allowed: a name ending in .safetensors, as a file is the input")
    recover(path)
    if path.exists() and path.is_dir() == is_file:
        raise ValueError(f"{what}: allowed: a file for a file, a directory for a directory")
    check_replaceable(output, force=force)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent):
        pass  # if it can be created, so can the output


def check_replaceable(output: Path, *, force: bool) -> None:
    """Reject an existing path, unless `force` is set and this program wrote all of it.

    A directory must hold the list that `new_folder` adds, and all its other files must be in that
    list, with the same sizes. A file must be a safetensors file with `FILE_MARK` in its metadata.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    what, path = f"OUT={str(output)!r}", output.resolve()
    if not os.path.lexists(path) or is_placeholder(path):
        return
    if not force:
        raise ValueError(f"{what} exists: allowed: a new name, or --force to replace it")
    foreign = _foreign(path) if path.is_dir() else _not_marked(path)
    if foreign:
        raise ValueError(
            f"{what} {foreign}: allowed with --force: what compress or decompress wrote, unchanged "
            "since"
        )


@contextmanager
def new_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """A new directory that replaces `output` when the block ends (`unfinished`).

    A list of its files is added, by which `check_replaceable` recognizes it.

    Raises:
        ValueError: `output` exists when the block ends and must not be replaced.
    """
    with unfinished(output) as folder:
        yield folder
        write_list(folder, {})
        check_replaceable(output, force=force)


def record_in_card(folder: Path, key: str, value: float) -> bool:
    """Add a measured value to the model card of an output, if that is as `compress` wrote it.

    Args:
        folder: the output.
        key: name of the value.
        value: what was measured.

    Returns:
        Whether it was added.
    """
    path = folder / "README.md"
    if not path.is_file() or _foreign(folder):
        return False
    text = path.read_text(encoding="utf-8")
    changed = with_fact(text, key, value)
    if changed is None:
        return False
    table = json.loads((folder / _LIST).read_bytes())
    write_durably(path, [changed.encode()])
    table["files"]["README.md"] = path.stat().st_size
    write_durably(folder / _LIST, [(json.dumps(table, indent=1) + "\n").encode()])
    return True


def write_list(folder: Path, made_of: Mapping[str, Any]) -> None:
    """Write the list of a directory's files by which `check_replaceable` recognizes it.

    Args:
        folder: whose other files are complete.
        made_of: what else the list is to say.
    """
    names = [name for name in _names(folder) if name != _LIST]
    sizes = {name: (folder / name).stat().st_size for name in names}
    (folder / _LIST).write_text(json.dumps({"files": sizes, **made_of}, indent=1) + "\n")


def _foreign(folder: Path) -> str | None:
    """A message about the first file that `new_folder` did not write; None if there is none."""
    sizes = _listed_sizes(folder / _LIST)
    if sizes is None:
        return f"has no {_LIST}"
    for name in _names(folder):
        path = folder / name
        if name not in (_LIST, *sizes):
            return f"holds {name!r} besides"
        if name != _LIST and (not path.is_file() or path.lstat().st_size != sizes[name]):
            return f"holds {name!r}, which was changed"
    return None


def _listed_sizes(path: Path) -> dict[str, int] | None:
    try:
        sizes = json.loads(path.read_bytes())["files"] if path.is_file() else None
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    return sizes if isinstance(sizes, dict) else None


def _not_marked(path: Path) -> str | None:
    table: dict[str, str] = {}
    if path.is_file():
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                table = file.metadata() or {}
        except safetensors.SafetensorError:
            pass
    return None if FILE_MARK.items() <= table.items() else "is of another program"


def _names(folder: Path) -> list[str]:
    """Relative paths of all files and links in a directory."""
    names = []
    for parent, directories, files in os.walk(folder):
        links = [name for name in directories if Path(parent, name).is_symlink()]
        names += [Path(parent, name).relative_to(folder).as_posix() for name in [*files, *links]]
    return sorted(names)
