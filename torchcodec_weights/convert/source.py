"""Where dense tensors come from: a directory or a file here, or behind a URL of fsspec.

Tensors are read by ranges of bytes, so that nothing but the tensor at hand is in memory, and of a
URL nothing is stored but the small files of a model.
"""

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.safetensors import (
    LENGTH_BYTES,
    SafetensorsHeader,
    StoredTensor,
    header_length,
    parse_header,
)
from torchcodec_weights.models.checkpoint import FORMAT_DTYPES
from torchcodec_weights.models.folder import check_folder
from torchcodec_weights.models.huggingface import is_weights
from torchcodec_weights.system.files import write_durably

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUFFIX = ".safetensors"

_PIECE = 2**24  # bytes of a request
_PAUSES = 0.5, 2.0, None  # seconds before a request is tried again
# Small files of models, for servers that list no files.
_SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "README.md",
    "LICENSE",
)


class Source(ABC):
    """Files of weights, and the small files beside them.

    Attributes:
        text: what the user gave, for messages.
        is_file: whether it is one safetensors file and not a model's directory.
        place: its path, if it lies on this machine.
    """

    text: str
    is_file: bool
    place: Path | None = None

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file; OSError if it is not there."""

    @abstractmethod
    def version(self, name: str) -> str:
        """What changes when a file is written: the time of its change, or the server's tag."""

    @abstractmethod
    def read(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes of a file from `start` on; OSError if that fails."""

    @abstractmethod
    def small_files(self, place: Path) -> Path:
        """A directory here with all files but the weights, for which `place` may be used."""

    @abstractmethod
    def check_deletable(self, name: str) -> None:
        """Raise ValueError if a file of weights is a link, or lies elsewhere."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file of weights; raises as `check_deletable`, and OSError."""

    @abstractmethod
    def weight_files(self, small: Path) -> list[str]:
        """Names of the files of weights, sorted.

        Args:
            small: what `small_files` returned.

        Raises:
            ValueError: there are none, or the index names files elsewhere.
        """

    def tensor(self, file: str, name: str, stored: StoredTensor, rows: int | None = None) -> Tensor:
        """A tensor as it is stored, or its first rows.

        Args:
            file: that holds it.
            name: of the tensor, for messages.
            stored: where and as what.
            rows: how many at most; None for all.

        Raises:
            OSError: it cannot be read; names it.
        """
        shape = list(stored.shape)
        if rows is not None:
            shape[0] = min(rows, shape[0])
        tensor = torch.empty(shape, dtype=FORMAT_DTYPES[stored.dtype])
        try:
            self.read(file, stored.start, tensor.reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise OSError(f"tensor {name!r} cannot be read: {error}") from error
        return tensor

    def header(self, name: str) -> tuple[SafetensorsHeader, bytes]:
        """The header of a file of weights, and its bytes.

        Raises:
            CodecError: it is no safetensors file, or one that is cut short; names the first tensor
                that is missing.
            OSError: it cannot be read.
        """
        what = f"{self.text}/{name}"
        size = self.size(name)
        first = bytearray(min(LENGTH_BYTES, size))
        self.read(name, 0, memoryview(first))
        text = bytearray(header_length(bytes(first), what))
        if LENGTH_BYTES + len(text) > size:
            raise CodecError(f"{what} is cut short within its header")
        self.read(name, LENGTH_BYTES, memoryview(text))
        header = parse_header(bytes(text), what)
        for tensor, stored in header.tensors.items():
            if stored.end > size:
                raise CodecError(
                    f"{what} is cut short: {size} bytes, and its tensor {tensor!r} ends at "
                    f"{stored.end}"
                )
        return header, bytes(first + text)


def open_source(text: str) -> Source:
    """The source that a path or URL names.

    Raises:
        ValueError: it is no model's directory, no .safetensors file and no URL.
        ModuleNotFoundError: a URL, and fsspec is not installed.
    """
    parts = urlsplit(text)
    if parts.scheme == "file":
        text = parts.path
    elif "://" in text:
        return UrlSource(text)
    return LocalSource(Path(text))


class LocalSource(Source):
    """A model's directory, or one file."""

    def __init__(self, path: Path) -> None:
        self.is_file = path.is_file()
        if not path.is_dir() and not (self.is_file and path.suffix == SUFFIX):
            raise ValueError(
                f"MODEL={str(path)!r}: allowed: a directory with config.json and safetensors, or a "
                ".safetensors file, or a URL of one of them"
            )
        self.text = str(path.parent if self.is_file else path)
        self.place = path
        self._root = path.parent if self.is_file else path

    def size(self, name: str) -> int:
        return (self._root / name).stat().st_size

    def version(self, name: str) -> str:
        return str((self._root / name).stat().st_mtime_ns)

    def read(self, name: str, start: int, buffer: memoryview) -> None:
        with (self._root / name).open("rb", buffering=0) as file:
            file.seek(start)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done : done + _PIECE])
                if not count:
                    raise OSError(f"{self._root / name} ends at byte {start + done}")
                done += count

    def small_files(self, place: Path) -> Path:
        return self._root

    def check_deletable(self, name: str) -> None:
        if (self._root / name).is_symlink():
            raise ValueError(
                f"--delete-source: {self._root / name} is a link: allowed: plain files, as others "
                "may use what it leads to"
            )

    def delete(self, name: str) -> None:
        self.check_deletable(name)
        (self._root / name).unlink()

    def weight_files(self, small: Path) -> list[str]:
        if self.is_file:
            assert self.place is not None
            return [self.place.name]
        check_folder(small)
        if (small / INDEX).exists():
            return files_of_index((small / INDEX).read_bytes(), str(small / INDEX))
        if not (small / SINGLE).exists():
            raise ValueError(f"{small} has no {SINGLE}, and no {INDEX}")
        return [SINGLE]


class UrlSource(Source):
    """A model's directory, or one file, behind a URL that fsspec opens."""

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs
        except ModuleNotFoundError:
            message = "fsspec is not installed: pip install 'torchcodec-weights[url]'"
            raise ModuleNotFoundError(message, name="fsspec") from None
        self.is_file = urlsplit(url).path.endswith(SUFFIX)
        self.text = url.rpartition("/")[0] if self.is_file else url.rstrip("/")
        self._name = url.rpartition("/")[2]
        try:
            self._system, root = url_to_fs(self.text)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"MODEL={url!r}: allowed: URLs that fsspec can open here: {error}"
            ) from None
        self._root = root.rstrip("/")
        self._information: dict[str, dict[str, Any]] = {}

    def _info(self, name: str) -> dict[str, Any]:
        if name not in self._information:
            with self._errors(name):
                self._information[name] = self._system.info(self._path(name))
        return self._information[name]

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        # File systems raise errors of any type: those of HTTP clients and of clouds.
        try:
            yield
        except OSError as error:
            raise OSError(f"{self.text}/{name}: {type(error).__name__}: {error}") from error
        except Exception as error:
            raise OSError(f"{self.text}/{name}: {type(error).__name__}: {error}") from error

    def size(self, name: str) -> int:
        size = self._info(name).get("size")
        if not isinstance(size, int):
            raise OSError(f"{self.text}/{name}: the server does not tell its size")
        return size

    def version(self, name: str) -> str:
        self._information.pop(name, None)
        info = self._info(name)
        for key in ("ETag", "etag", "LastModified", "mtime", "modified", "created"):
            if info.get(key):
                return str(info[key])
        return ""

    def read(self, name: str, start: int, buffer: memoryview) -> None:
        for first in range(0, len(buffer), _PIECE):
            piece = buffer[first : first + _PIECE]
            with self._errors(name):
                data = self._request(name, start + first, start + first + len(piece))
            if len(data) != len(piece):
                raise OSError(
                    f"{self.text}/{name}: {len(data)} bytes came where {len(piece)} were asked "
                    "for: needed: a server that answers requests for ranges of bytes"
                )
            piece[:] = data

    def _request(self, name: str, start: int, end: int) -> bytes:
        for pause in _PAUSES:
            try:
                return bytes(self._system.cat_file(self._path(name), start=start, end=end))
            except FileNotFoundError:
                raise
            except Exception:
                if pause is None:
                    raise
                time.sleep(pause)
        raise AssertionError

    def small_files(self, place: Path) -> Path:
        place.mkdir(exist_ok=True)
        if self.is_file:
            return place
        for name in {*self._listed(), *_SMALL, INDEX}:
            plain = not name.startswith(".") and not set(name) & {"/", "\\", "\0"}
            if not plain or (is_weights(name) and name != INDEX) or (place / name).exists():
                continue
            try:
                data = self._system.cat_file(self._path(name))
            except FileNotFoundError:
                continue
            except Exception as error:
                raise OSError(f"{self.text}/{name}: {type(error).__name__}: {error}") from error
            write_durably(place / name, [data])
        return place

    def _listed(self) -> list[str]:
        try:
            entries = self._system.ls(self._root, detail=True)
        except Exception:
            return []  # many servers of HTTP list nothing
        files = [str(entry["name"]) for entry in entries if entry.get("type") == "file"]
        return [name.rpartition("/")[2] for name in files if name.startswith(f"{self._root}/")]

    def check_deletable(self, name: str) -> None:
        raise ValueError("--delete-source: allowed where MODEL is a directory or file here")

    def delete(self, name: str) -> None:
        self.check_deletable(name)

    def weight_files(self, small: Path) -> list[str]:
        if self.is_file:
            return [self._name]
        if (small / INDEX).exists():
            return files_of_index((small / INDEX).read_bytes(), f"{self.text}/{INDEX}")
        return [SINGLE]


def files_of_index(data: bytes, what: str) -> list[str]:
    """Names of the files that an index names, sorted.

    Raises:
        ValueError: it is malformed, or names a file that does not lie beside it.
    """
    try:
        names = set(json.loads(data)["weight_map"].values())
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{what} is no index that can be read: {error}") from None
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name or name.startswith("."):  # noqa: PTH119
            raise ValueError(f"{what} names the file {name!r}: allowed: files beside it")
        if not name.endswith(SUFFIX):
            raise ValueError(f"{what} names the file {name!r}: allowed: names in {SUFFIX}")
    if not names:
        raise ValueError(f"{what} names no file")
    return sorted(names)
