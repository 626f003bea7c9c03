"""Outputs are there whole or not at all: after errors, kills and power cuts."""

import errno
import inspect
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import tiny_llama

from torchcodec_weights import load_file, save_file
from torchcodec_weights.cli import main
from torchcodec_weights.system import files
from torchcodec_weights.system.files import recover, unfinished

MIB = 1 << 20
FAST = ["--preset", "fast"]


def fill(path: Path, number: int, *, folder: bool) -> None:
    """Write a file, or a directory of five files, of which every eight bytes are `number`.

    In parts and with pauses, so that a kill often finds it half written.
    """
    files = ("a", "b", "inner/c", "inner/d", "e") if folder else ("",)
    for name in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        with (path / name).open("wb", buffering=0) as file:
            for _ in range(10 // len(files)):
                file.write(number.to_bytes(8, "little") * (MIB // 4 // 8))
                time.sleep(0.002)


def number_in(path: Path) -> int:
    """The number of a file or directory that `fill` wrote; fails unless it is whole."""
    data = path.read_bytes() if path.is_file() else b""
    if path.is_dir():
        found = sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))
        assert found == ["a", "b", "e", "inner", "inner/c", "inner/d"]
        data = b"".join((path / name).read_bytes() for name in found if name != "inner")
    assert len(data) == 5 * MIB // 2
    assert data == data[:8] * (len(data) // 8)
    return int.from_bytes(data[:8], "little")


def write(path: Path, number: int, *, folder: bool) -> None:
    with unfinished(path) as temporary:
        fill(temporary, number, folder=folder)


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def no_exchange(first: Path, second: Path) -> bool:
    return False


folder_or_file = pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])


@folder_or_file
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
def test_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", no_exchange)
    for number in (1, 2, 3):
        write(tmp_path / "out", number, folder=folder)
        assert number_in(tmp_path / "out") == number
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_directory_is_there_at_every_moment(tmp_path: Path) -> None:
    write(tmp_path / "out", 0, folder=True)
    (tmp_path / "other").mkdir()
    if not files._exchange(tmp_path / "other", tmp_path / "out"):
        pytest.skip("this file system has no RENAME_EXCHANGE")
    missing, done = 0, threading.Event()

    def look() -> None:
        nonlocal missing
        while not done.is_set():
            missing += not (tmp_path / "out").exists()

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(100):
        with unfinished(tmp_path / "out") as temporary:
            temporary.mkdir()
    done.set()
    thread.join()
    assert missing == 0


@folder_or_file
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_permissions_are_those_of_the_umask(tmp_path: Path, folder: bool, mask: int) -> None:
    before = os.umask(mask)
    try:
        write(tmp_path / "out", 1, folder=folder)
        save_file({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o7777 == (0o777 if folder else 0o666) & ~mask
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o7777 == 0o666 & ~mask


@folder_or_file
def test_kinds_do_not_replace_each_other(tmp_path: Path, folder: bool) -> None:
    out = tmp_path / "out"
    write(out, 1, folder=not folder)
    with pytest.raises(NotADirectoryError if folder else IsADirectoryError):
        write(out, 2, folder=folder)
    assert number_in(out) == 1
    assert not hidden(tmp_path)


def test_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to("there/out")
    write(tmp_path / "out", 1, folder=False)
    assert (tmp_path / "out").is_symlink()
    assert number_in(tmp_path / "there" / "out") == 1
    assert not hidden(tmp_path / "there")


@folder_or_file
def test_leftovers_are_told_and_not_used(tmp_path: Path, folder: bool) -> None:
    out = tmp_path / "out"
    leftover = tmp_path / ".out.abcd_123.tmp"
    fill(leftover / "new", 1, folder=True)
    (leftover / "new" / "stale").touch()
    # Those of other names are not its business.
    (tmp_path / ".out2.abcd_123.tmp").mkdir()
    (tmp_path / ".out.txt").touch()
    with pytest.warns(UserWarning, match=r"\.out\.abcd_123\.tmp is left.* rm -r '?/") as told:
        write(out, 2, folder=folder)
    assert len(told) == 1
    assert number_in(out) == 2
    command = str(told[0].message).split("remove it: ")[1]
    subprocess.run(command, shell=True, check=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(out, 3, folder=folder)
    assert number_in(out) == 3


@pytest.mark.filterwarnings("ignore:.*is left of a run")
@folder_or_file
def test_concurrent_runs_do_not_touch_each_other(tmp_path: Path, folder: bool) -> None:
    out = tmp_path / "out"
    with unfinished(out) as first:
        fill(first, 1, folder=folder)
        write(out, 2, folder=folder)
        assert number_in(out) == 2
    assert number_in(out) == 1
    assert not hidden(tmp_path)


@pytest.mark.parametrize("stage", ["_flush_tree", "_replace_directory", "_flush"])
@folder_or_file
def test_error_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, folder: bool
) -> None:
    out = tmp_path / "out"
    write(out, 1, folder=folder)

    def fail(*_: Path) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(files, stage, fail)
    if stage == "_replace_directory" and not folder:
        write(out, 1, folder=False)  # is not called for a file
    else:
        with pytest.raises(OSError, match="quota"):
            write(out, 2, folder=folder)
    assert number_in(out) == 1
    assert not hidden(tmp_path)


def test_interrupt_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write(out, 1, folder=True)

    def interrupt(new: Path, path: Path, old: Path) -> None:
        path.rename(old)
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_replace_directory", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(out, 2, folder=True)
    assert number_in(out) == 1
    assert not hidden(tmp_path)


# What writes until it is killed. Only the module under test is imported, so that it starts at once.
WRITER = """
import importlib.util, os, signal, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
fill_source, folder, mode, target = sys.argv[2], sys.argv[3] == "True", sys.argv[4], sys.argv[5]
MIB = 1 << 20
exec(fill_source)
if mode in ("renames", "between"):
    files._exchange = lambda first, second: False
if mode == "between":
    rename = Path.rename
    def rename_and_die(path, new):
        rename(path, new)
        os.kill(os.getpid(), signal.SIGKILL)
    Path.rename = rename_and_die
number = 1
while True:
    number += 1
    path = Path(f"{target}{number}" if mode == "new" else target)
    with files.unfinished(path) as temporary:
        fill(temporary, number, folder=folder)
    print(number, flush=True)
"""


def writer(target: Path, mode: str, *, folder: bool) -> "subprocess.Popen[str]":
    arguments = [files.__file__, inspect.getsource(fill), str(folder), mode, str(target)]
    command = [sys.executable, "-I", "-c", WRITER, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.filterwarnings("ignore:.*is left of a run", "ignore:.*was put back")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("folder", "mode"),
    [(False, "new"), (True, "new"), (False, "replace"), (True, "replace"), (True, "renames")],
)
def test_kill(tmp_path: Path, folder: bool, mode: str, seed: int) -> None:
    out = tmp_path / "out"
    if mode != "new":
        write(out, 1, folder=folder)
    with writer(out, mode, folder=folder) as process:
        assert process.stdout is not None
        reported = process.stdout.readline()
        # Uniform over a few outputs, each of which takes tens of milliseconds.
        time.sleep(random.Random(f"{folder} {mode} {seed}").uniform(0, 0.15))
        process.kill()
        last = int((reported + process.stdout.read()).split()[-1])
    assert process.returncode == -signal.SIGKILL
    if mode == "new":
        found = {number_in(path) for path in tmp_path.glob("out*")}
        assert set(range(2, last + 1)) <= found <= set(range(2, last + 2))
    else:
        recover(out)
        assert number_in(out) in (last, last + 1)
    write(out, 0, folder=folder)
    assert number_in(out) == 0


def test_kill_between_two_renames(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, 1, folder=True)
    with writer(out, "between", folder=True) as process:
        pass
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    (leftover,) = hidden(tmp_path)
    with pytest.warns(UserWarning, match="was put back|is left") as told:
        recover(out)
    assert len(told) == 2
    assert number_in(out) == 1
    # What is left holds the new directory, and is not taken for the former one.
    assert not (leftover / "old").exists()
    with pytest.warns(UserWarning, match="is left"):
        write(out, 3, folder=True)
    assert number_in(out) == 3


def contents(path: Path) -> dict[str, bytes]:
    """All files of a directory, or one."""
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in found}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A model's directory and a safetensors file."""
    folder = tmp_path_factory.mktemp("sources")
    tiny_llama().save_pretrained(folder / "llama")
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    safetensors.torch.save_file({"weight": weight}, folder / "weight.safetensors")
    return {True: folder / "llama", False: folder / "weight.safetensors"}


@pytest.mark.filterwarnings("ignore:.*is left of a run", "ignore:Config Deprecation")
@folder_or_file
def test_kill_of_compress(tmp_path: Path, sources: dict[bool, Path], folder: bool) -> None:
    suffix = "" if folder else ".safetensors"
    out, other = tmp_path / f"out{suffix}", tmp_path / f"other{suffix}"
    arguments = ["compress", str(sources[folder])]
    assert main([*arguments, str(out), "--bits", "5", *FAST]) == 0
    assert main([*arguments, str(other), "--bits", "4", *FAST]) == 0
    before, after = contents(out), contents(other)
    assert before != after
    command = [sys.executable, "-m", "torchcodec_weights.cli", *arguments, str(out), "--bits", "4"]
    for seed in range(2):
        with subprocess.Popen([*command, *FAST, "--force"], stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not list(tmp_path.glob(".out*.unfinished/new")):
                time.sleep(0.001)
            time.sleep(random.Random(seed).uniform(0, 0.3))
            process.kill()
        assert contents(out) in (before, after)
    assert main([*arguments, str(out), "--bits", "4", *FAST, "--force"]) == 0
    assert contents(out) == after


@contextmanager
def mounted(folder: Path, *arguments: str | Path) -> Iterator[Path]:
    """A mounted file system; skips the test where that is not allowed."""
    folder.mkdir(exist_ok=True)
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("mounting needs root")
    done = subprocess.run(["mount", *arguments, folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A file with an ext4 file system, to be mounted by a loop device."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed")
    image = tmp_path / "device"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    return image


def write_tensors(path: Path, number: int, *, folder: bool) -> None:
    save_file({"x": torch.full((MIB,), number, dtype=torch.int16)}, path)


def number_in_tensors(path: Path) -> int:
    (number,) = load_file(path)["x"].unique().tolist()
    return number


@pytest.mark.parametrize("replace", [False, True], ids=["new", "replace"])
@pytest.mark.parametrize(
    ("write_", "read", "folder"),
    [
        (write, number_in, False),
        (write, number_in, True),
        (write_tensors, number_in_tensors, False),
    ],
    ids=["file", "folder", "save_file"],
)
def test_power_cut_after_success_loses_nothing(
    tmp_path: Path,
    device: Path,
    write_: Callable[..., None],
    read: Callable[[Path], int],
    folder: bool,
    replace: bool,
) -> None:
    """A copy of a mounted device is what a power cut leaves of it: what was flushed, no more."""
    # No flush of the journal but those that are asked for.
    with mounted(tmp_path / "mounted", "-o", "loop,commit=600", device) as place:
        if replace:
            write_(place / "out", 1, folder=folder)
        subprocess.run(["sync", "-f", place], check=True)
        (place / "not flushed").write_bytes(b"x")
        write_(place / "out", 2, folder=folder)
        shutil.copyfile(device, tmp_path / "copy")
    with mounted(tmp_path / "after", "-o", "loop", tmp_path / "copy") as place:
        assert read(place / "out") == 2


@pytest.mark.parametrize("flush", ["_flush", "_flush_tree"])
@folder_or_file
def test_without_flushes_a_power_cut_loses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Path, flush: str, folder: bool
) -> None:
    """That the test above can fail: what it would see without each of the two flushes."""
    monkeypatch.setattr(files, flush, lambda path: None)
    with mounted(tmp_path / "mounted", "-o", "loop,commit=600", device) as place:
        subprocess.run(["sync", "-f", place], check=True)
        write(place / "out", 2, folder=folder)
        shutil.copyfile(device, tmp_path / "copy")
    with mounted(tmp_path / "after", "-o", "loop", tmp_path / "copy") as place:
        if flush == "_flush":
            assert not (place / "out").exists()
        else:
            with pytest.raises(AssertionError):
                number_in(place / "out")


@folder_or_file
def test_full_disk(tmp_path: Path, folder: bool) -> None:
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=4m", "tmpfs") as place:
        write(place / "out", 1, folder=folder)
        with pytest.raises(OSError, match="No space left"):
            write(place / "out", 2, folder=folder)
        assert number_in(place / "out") == 1
        assert not hidden(place)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond a size; stands in for a full disk where nothing can be mounted."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@folder_or_file
def test_file_that_may_not_grow(tmp_path: Path, folder: bool) -> None:
    write(tmp_path / "out", 1, folder=folder)
    with largest_file(MIB // 4), pytest.raises(OSError, match="File too large"):
        write(tmp_path / "out", 2, folder=folder)
    assert number_in(tmp_path / "out") == 1
    assert not hidden(tmp_path)


@pytest.mark.filterwarnings("ignore:Config Deprecation")
@folder_or_file
def test_compress_where_a_file_may_not_grow(
    tmp_path: Path,
    sources: dict[bool, Path],
    capsys: pytest.CaptureFixture[str],
    folder: bool,
) -> None:
    out = tmp_path / ("out" if folder else "out.safetensors")
    arguments = ["compress", str(sources[folder]), str(out), "--bits", "5", *FAST]
    assert main(arguments) == 0
    before = contents(out)
    capsys.readouterr()
    with largest_file(MIB // 16):
        assert main([*arguments, "--force"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "error" in line] == lines[-1:]
    assert "File too large" in lines[-1]
    assert contents(out) == before
    assert main([*arguments, "--force"]) == 0  # goes on with what is finished
    assert contents(out) == before
    assert not hidden(tmp_path)


@folder_or_file
def test_read_only_place(
    tmp_path: Path,
    sources: dict[bool, Path],
    capsys: pytest.CaptureFixture[str],
    folder: bool,
) -> None:
    """Said before any work."""
    name = "out" if folder else "out.safetensors"
    arguments = ["compress", str(sources[folder]), str(tmp_path / "place" / name), "--bits", "5"]
    with mounted(tmp_path / "place", "-t", "tmpfs", "-o", "ro", "tmpfs") as place:
        with pytest.raises(OSError, match="Read-only file system"):
            write(place / "out", 2, folder=folder)
        capsys.readouterr()
        assert main(arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "Read-only file system" in line
