"""Hidden states of many inputs, or their gradients, in a file: one input is in memory at a time."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from torchcodec_weights.system.files import allocate, replace_durably


class StateFiles:
    """Files of tensors, one tensor for each input, all files of the same shapes and dtype."""

    def __init__(self, folder: Path, shapes: Sequence[torch.Size], dtype: torch.dtype) -> None:
        """Files in a directory.

        Args:
            folder: that exists.
            shapes: of each input's tensor.
            dtype: of all.
        """
        self._folder = folder
        self._shapes = [*shapes]
        self._dtype = dtype
        ends = [0]
        for shape in shapes:
            ends.append(ends[-1] + shape.numel() * dtype.itemsize)
        self._ends = ends

    @property
    def size(self) -> int:
        """Bytes of a file."""
        return self._ends[-1]

    def path(self, name: str) -> Path:
        """Where a file lies."""
        return self._folder / name

    def exists(self, name: str) -> bool:
        """Whether a file is there, whole."""
        path = self.path(name)
        return path.is_file() and path.stat().st_size == self.size

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        self.path(name).unlink(missing_ok=True)

    def read(self, name: str, number: int) -> Tensor:
        """The tensor of an input.

        Raises:
            OSError: it cannot be read.
        """
        tensor = torch.empty(self._shapes[number], dtype=self._dtype)
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        with self.path(name).open("rb") as file:
            file.seek(self._ends[number])
            if file.readinto(data) != len(data):
                raise OSError(f"{self.path(name)} is cut short")
        return tensor

    @contextmanager
    def written(self, name: str) -> Iterator["Writer"]:
        """A file that gets its name, on the device, when the block ends.

        Raises:
            OSError: it cannot be written.
        """
        temporary = self.path(f"{name}.tmp")
        with temporary.open("wb") as file:
            # A full disk is told here, and not after hours.
            allocate(file, 0, self.size)
            yield Writer(file.fileno(), self._ends)
        replace_durably(temporary, self.path(name), temporary)


class Writer:
    """Takes the tensors of a file, in any order."""

    def __init__(self, descriptor: int, starts: Sequence[int]) -> None:
        self._descriptor = descriptor
        self._starts = starts

    def put(self, number: int, tensor: Tensor) -> None:
        """Write the tensor of an input, of the files' dtype."""
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        start = self._starts[number]
        while data:
            count = os.pwrite(self._descriptor, data, start)
            data, start = data[count:], start + count
