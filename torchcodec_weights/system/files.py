"""Atomic writing of files and directories, also across a power cut."""

import ctypes
import errno
import os
import re
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# In the temporary directory: what is written, what it replaces, and a file for its permissions.
_NEW, _OLD, _PLAIN = "new", "old", "plain"
_PIECE = 1 << 20  # bytes that are written at once
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>
# Errors of file systems without fsync of a directory, and without RENAME_EXCHANGE.
_NO_FSYNC = (errno.EBADF, errno.EINVAL, errno.ENOTSUP)
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A temporary name for a file or a directory that replaces `path` when the block ends.

    The name lies in a new directory `.{name}.XXXXXXXX.tmp` beside `path`, on the same file system.
    When the block ends, files get the permissions that the umask gives, all that was written is
    flushed to the device (fsync of every file and directory) and renamed to `path`, and the
    directory above is flushed. When the block fails, the written files are removed and `path` is
    unchanged.

    At every moment `path` is either the old or the new content, complete, and after return a power
    cut loses nothing. A file is replaced by rename(2), a directory by renameat2(2) with
    RENAME_EXCHANGE. Where a file system has no such exchange (NFS, some FUSE), two renames do it,
    and a kill or power cut between them leaves nothing under the name: `recover` puts the former
    directory back.

    Files that a killed run left are never used by a later run: see `recover`, which is called
    first.

    Args:
        path: the file or directory to write. Links are followed. A directory replaces only a
            directory, and a file only a file.

    Raises:
        OSError: `path` cannot be written.
    """
    path = path.resolve()
    recover(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    new, old = temporary / _NEW, temporary / _OLD
    try:
        yield new
        _open_up(new, temporary / _PLAIN)
        _flush_tree(new)
        if new.is_dir() and path.is_dir():
            _replace_directory(new, path, old)
        else:
            new.replace(path)
        _flush(path.parent)
    finally:
        if _is_stranded(old, path):
            old.rename(path)
        # An error here must not hide the error of the block, nor turn success into failure.
        shutil.rmtree(temporary, ignore_errors=True)
        if temporary.exists():
            _warn_of(temporary, path)


def replace(path: Path, contents: bytes) -> None:
    """Write a file that can be made anew, as those of a cache are; readers see all of it or none.

    Unlike `unfinished` it flushes nothing, and processes that write the same file at the same time
    do not warn of each other.

    Raises:
        OSError: `path` cannot be written.
    """
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(contents)
            file.close()
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink()
            raise


def write_durably(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file under the name `{path}.tmp`, flush it to the device, and rename it to `path`.

    For files in a directory that one process writes: the temporary name is always the same, so
    that a killed run leaves no more than one such file, which the next one overwrites.

    Raises:
        OSError: it cannot be written; the temporary file is removed.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def replace_durably(new: Path, path: Path, old: Path) -> None:
    """Give a finished file or directory its name, in one step where the file system can.

    Args:
        new: what was written.
        path: its name from now on. What has that name is replaced; a directory only by a directory.
        old: a free name beside `new`, for a directory that is replaced by two renames. After a kill
            between them nothing has the name `path`; then this is to be called again.
    """
    _flush_tree(new)
    if new.is_dir() and path.is_dir():
        _replace_directory(new, path, old)
    else:
        new.replace(path)
    _flush(path.parent)


def allocate(file: IO[bytes], offset: int, size: int) -> None:
    """Take room on the disk for a part of an open file, which ends at `offset` or after.

    Raises:
        OSError: there is none.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), offset, size)
        return
    file.seek(offset)  # macOS
    for done in range(0, size, _PIECE):
        file.write(bytes(min(_PIECE, size - done)))
    file.flush()


def read_ahead(path: Path, ranges: Iterable[tuple[int, int]]) -> None:
    """Have the system read parts of a file into its cache; without waiting, where it can.

    Args:
        path: of the file.
        ranges: first byte and number of bytes of each part.

    Raises:
        OSError: it cannot be opened.
    """
    if not hasattr(os, "posix_fadvise"):
        return  # macOS
    with path.open("rb") as file:
        for start, size in ranges:
            if size:  # 0 stands for all that follows
                os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)


def recover(path: Path) -> None:
    """Restore what a killed run of `unfinished` had renamed, and warn of files that it left.

    Nothing is removed, as another process may be writing now. The warning says how to remove it.

    Args:
        path: the file or directory that is to be written.
    """
    path = path.resolve()
    if not path.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.tmp")
    for temporary in sorted(path.parent.iterdir()):
        if not pattern.fullmatch(temporary.name) or not temporary.is_dir():
            continue
        if _is_stranded(temporary / _OLD, path):
            (temporary / _OLD).rename(path)
            _flush(path.parent)
            warnings.warn(
                f"{path} was put back: a run was killed while it replaced it", stacklevel=1
            )
        _warn_of(temporary, path)


def _warn_of(temporary: Path, path: Path) -> None:
    # From one place, so that Python's default filter shows each leftover once in a process.
    warnings.warn(
        f"{temporary} is left of a run that was killed, unless one is writing {path} now; to "
        f"remove it: rm -r {shlex.quote(str(temporary))}",
        stacklevel=1,
    )


def _is_stranded(old: Path, path: Path) -> bool:
    """Whether a run was killed between two renames: the old directory is renamed, `path` missing.

    If another process is between its renames now and this process restores its old directory, the
    other's second rename fails, and nothing is lost.
    """
    return old.is_dir() and not os.path.lexists(path)


def _replace_directory(new: Path, path: Path, old: Path) -> None:
    if not _exchange(new, path):
        path.rename(old)
        new.rename(path)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def _open_up(path: Path, plain: Path) -> None:
    """Give files at least the permissions of a new file, as safetensors writes them as 0600.

    These are read from a new file: the umask can only be read by setting it, which would affect
    other threads, and a directory may have a default access control list.
    """
    plain.touch()
    wanted = plain.stat().st_mode
    for file in [path, *path.rglob("*")]:
        mode = file.stat().st_mode
        if file.is_file() and mode | wanted != mode:
            file.chmod(mode | wanted)


def _flush_tree(path: Path) -> None:
    """Flush a file, or a directory with all that is in it."""
    if path.is_dir():
        for child in path.iterdir():
            _flush_tree(child)
    _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(descriptor)
