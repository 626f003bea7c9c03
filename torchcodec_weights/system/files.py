"""Files and directories that are there whole or not at all, after a power cut too."""

import ctypes
import errno
import os
import re
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# In the temporary directory: what is written, what it replaces, and a file for its permissions.
_NEW, _OLD, _PLAIN = "new", "old", "plain"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>
# What file systems without it answer to fsync of a directory, and to RENAME_EXCHANGE.
_NO_FSYNC = (errno.EBADF, errno.EINVAL, errno.ENOTSUP)
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A temporary name for a file or a directory that takes the place of `path` in the end.

    The name lies in a new directory `.{name}.XXXXXXXX.tmp` beside `path`, on the same file system.
    When the block ends, files get the permissions that the umask gives, all that was written is
    flushed to the device (fsync of every file and directory) and renamed to `path`, and the
    directory above is flushed. When the block fails, what was written is removed and `path` is as
    it was.

    At every moment `path` is what it was or what was written, whole, and after return a power cut
    loses nothing. A file is replaced by rename(2), a directory by renameat2(2) with
    RENAME_EXCHANGE. Where a file system has no such exchange (NFS, some FUSE), two renames do it,
    and a kill or power cut between them leaves nothing under the name: `recover` puts the former
    directory back.

    What a killed run leaves is never used by a later one: see `recover`, which is called first.

    Args:
        path: what to write. A link is followed. A directory replaces a directory only, and a file
            a file.

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
        # An error here must not hide the one that led here, nor turn success into failure.
        shutil.rmtree(temporary, ignore_errors=True)
        if temporary.exists():
            _warn_of(temporary, path)


def recover(path: Path) -> None:
    """Put back what a killed run of `unfinished` moved aside, and warn of all that it left.

    Nothing is removed: another process may be writing it now. The warning says how to.

    Args:
        path: what is to be written.
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
    """Whether two renames were cut short: the former directory is aside, and nothing in its place.

    Where another process is between its renames just now, and its former directory is put back by
    this one, its second rename fails, and nothing is lost.
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
    """Give files at least the permissions that any new file has: safetensors writes them as 0600.

    A file is made to see them. The process's umask can be read only by setting it, which other
    threads would notice, and a directory's default access control list counts too.
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
