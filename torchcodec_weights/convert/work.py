"""The directory in which an output grows, which a killed run leaves and the next one goes on with.

`.OUT.unfinished` beside OUT holds

    manifest.json   the settings, and the files of the source: sizes, versions, hashes of headers
    headers/        the headers of the source's files, which `--delete-source` may have deleted
    parts/          finished tensors, one file each
    done/           what each finished file of the output is made of
    calibration/    what was found of the model, with `--calibrate`
    new/            the output

Every file is written under a temporary name, flushed and renamed. The output gets its name in one
step, when it is whole; until then a directory OUT holds one file, a `config.json` that says so.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchcodec_weights.convert.parts import Part, read_part
from torchcodec_weights.convert.plan import PlannedFile, kept_file
from torchcodec_weights.convert.shard import Done, read_done
from torchcodec_weights.models.folder import UNFINISHED, unfinished_message
from torchcodec_weights.system.files import replace_durably, write_durably

_FORMAT = 1


class Work:
    """The working directory of one output.

    Attributes:
        out: the output.
        root: the working directory.
        small: place for the small files of a source that lies elsewhere.
        new: where the files of the output are written.
        calibration: place for what is found of the model before it is encoded.
    """

    def __init__(self, out: Path, *, is_file: bool) -> None:
        self.out = out.resolve()
        self.root = self.out.with_name(f".{self.out.name}.unfinished")
        self.small = self.root / "small"
        self.new = self.root / "new"
        self.calibration = self.root / "calibration"
        self._parts = self.root / "parts"
        self._done = self.root / "done"
        self._headers = self.root / "headers"
        self._manifest = self.root / "manifest.json"
        self._whole = self.root / "whole"
        self._placeholder = self.root / "placeholder"  # of the output, until it has its name
        self._is_file = is_file

    @contextmanager
    def locked(self, worker: tuple[int, int] | None) -> Iterator[None]:
        """Hold the directory: alone, or beside other workers.

        Raises:
            ValueError: another process holds it.
        """
        self.root.mkdir(exist_ok=True)
        names = ["lock"] if worker is None else ["lock", f"worker-{worker[0]}-of-{worker[1]}"]
        with _Locks() as locks:
            for name in names:
                shared = worker is not None and name == "lock"
                if not locks.take(self.root / name, shared=shared):
                    raise ValueError(f"{self.out}: another run is writing it now: {self.root}")
            yield

    @contextmanager
    def exclusively(self, what: str) -> Iterator[None]:
        """Wait until no other worker does the same.

        Args:
            what: name of what is done: a file in the directory.
        """
        with _Locks() as locks:
            locks.take(self.root / what, shared=False, wait=True)
            yield

    def exists(self) -> bool:
        """Whether a run has begun, and not ended."""
        return self._manifest.is_file()

    def manifest(self) -> dict[str, Any]:
        """What the run began with.

        Raises:
            ValueError: it is of another version of this package.
        """
        try:
            table: dict[str, Any] = json.loads(self._manifest.read_bytes())
            known = table["format"] == _FORMAT
        except (ValueError, LookupError, TypeError):
            known = False
        if not known:
            raise ValueError(
                f"{self.root} is not of this version of torchcodec-weights: allowed: --force to "
                "begin anew"
            )
        return table

    def clear(self) -> None:
        """Remove what a run left that was killed while it removed the directory.

        Without its manifest nothing tells of which settings and source that is.
        """
        folders = (self._parts, self._done, self._headers, self.new, self.small, self.calibration)
        for folder in folders:
            if folder.exists():
                shutil.rmtree(folder)

    def begin(self, settings: Mapping[str, Any], files: Sequence[PlannedFile]) -> None:
        """Write the manifest of a new run."""
        for folder in (self._parts, self._done, self._headers, self.new):
            folder.mkdir(exist_ok=True)
        for file in files:
            write_durably(self._headers / file.name, [file.raw])
        if not self._is_file and not self.out.exists():
            # In one step: a directory without this file is taken for someone else's.
            self._placeholder.mkdir(exist_ok=True)
            text = json.dumps({"model_type": unfinished_message(self.out), UNFINISHED: True})
            write_durably(self._placeholder / "config.json", [text.encode()])
            self._placeholder.rename(self.out)
        self._write_manifest(settings, files)

    def update(self, settings: Mapping[str, Any], files: Sequence[PlannedFile]) -> None:
        """Write a manifest with other versions of files, whose contents are the same."""
        self._write_manifest(settings, files)

    def _write_manifest(self, settings: Mapping[str, Any], files: Sequence[PlannedFile]) -> None:
        table = {
            "format": _FORMAT,
            "settings": dict(settings),
            "files": {
                file.name: {"size": file.size, "version": file.version, "sha256": file.digest}
                for file in files
            },
        }
        write_durably(self._manifest, [json.dumps(table, indent=1).encode()])

    def kept(self, name: str) -> PlannedFile:
        """A file of the source as it was when the run began."""
        known = self.manifest()["files"][name]
        raw = (self._headers / name).read_bytes()
        if hashlib.sha256(raw).hexdigest() != known["sha256"]:
            raise ValueError(f"{self._headers / name} is damaged: allowed: --force to begin anew")
        return kept_file(name, known["size"], known["version"], raw)

    def part(self, number: int) -> Part | None:
        """The finished tensor of a number, or None."""
        return read_part(self.part_path(number))

    def part_path(self, number: int) -> Path:
        """Where the part of a tensor lies; `number` counts the plan's tasks."""
        return self._parts / f"{number:06d}"

    def has_parts(self) -> bool:
        """Whether something is finished."""
        folders = [folder for folder in (self._parts, self._done) if folder.is_dir()]
        return any(not path.name.endswith(".tmp") for f in folders for path in f.iterdir())

    def done(self, name: str) -> Done | None:
        """The record of a file of the output, if that is whole."""
        found = read_done(self._done / f"{name}.json")
        path = self.new / name
        if found is None or not path.is_file() or path.stat().st_size != found.size:
            return None
        return found

    def finish_file(self, name: str, written: Path, done: Done) -> None:
        """Give a file of the output its name, and record what it is made of."""
        replace_durably(written, self.new / name, written)
        write_durably(self._done / f"{name}.json", [json.dumps(done.to_json()).encode()])

    @property
    def is_whole(self) -> bool:
        """Whether the output is whole, and has its name or is to get it."""
        return self._whole.is_file()

    def publish(self, settings: Mapping[str, Any], files: Sequence[str]) -> None:
        """Give the whole output its name, and remove this directory.

        Args:
            settings: of the run.
            files: names of its files of weights.
        """
        product = self.new / files[0] if self._is_file else self.new
        table = {
            "product": product.relative_to(self.root).as_posix(),
            "inode": product.stat().st_ino,
            "settings": dict(settings),
        }
        write_durably(self._whole, [json.dumps(table).encode()])
        self.publish_whole()

    def publish_whole(self) -> dict[str, Any]:
        """Go on with `publish` after a kill; returns the settings of the run."""
        table = json.loads(self._whole.read_bytes())
        if not self.out.exists() or self.out.stat().st_ino != table["inode"]:
            replace_durably(self.root / table["product"], self.out, self.root / "old")
        self.remove()
        settings: dict[str, Any] = table["settings"]
        return settings

    def remove(self) -> None:
        """Remove the directory, and an output of which nothing is there yet."""
        if not self.root.is_dir():
            return
        if is_placeholder(self.out):
            shutil.rmtree(self._placeholder, ignore_errors=True)
            self.out.rename(self._placeholder)
        # First what says that a run has begun, last what says that it has ended: so that a kill
        # leaves nothing that is taken for something else.
        paths = sorted(self.root.iterdir(), key=lambda p: (p == self._whole, p != self._manifest))
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        shutil.rmtree(self.root, ignore_errors=True)


class _Locks:
    """Files that are locked until the block ends, or the process."""

    def __init__(self) -> None:
        self._files: list[Any] = []

    def __enter__(self) -> "_Locks":
        return self

    def take(self, path: Path, *, shared: bool, wait: bool = False) -> bool:
        """Lock a file; False if another process has it."""
        file = path.open("a")
        self._files.append(file)
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()


def is_placeholder(out: Path) -> bool:
    """Whether a directory stands for an output that is not whole, and holds nothing else."""
    try:
        names = [path.name for path in out.iterdir()]
        table = json.loads((out / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return names == ["config.json"] and isinstance(table, dict) and UNFINISHED in table
