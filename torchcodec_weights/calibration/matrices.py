"""Float32 matrices that lie one after the other in a file, and are mapped one at a time."""

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.system.files import allocate


@dataclass(frozen=True)
class Place:
    """Where an array lies in a file.

    Attributes:
        offset: bytes before it.
        shape: of the float32 array, little-endian, in C order.
    """

    offset: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return 4 * math.prod(self.shape)


class MatrixFile:
    """A file of float32 arrays.

    Each `read` or `write` maps one array, and what is dropped is unmapped: so no more of the file
    counts as this process's memory than the arrays in use.
    """

    def __init__(self, file: IO[bytes], folder: Path | None = None) -> None:
        """For files that are open; `folder` is where a temporary one lies, for messages."""
        self._file = file
        self._folder = folder
        self._end = os.fstat(file.fileno()).st_size

    @classmethod
    def temporary(cls, folder: Path | None = None) -> "MatrixFile":
        """An empty file that is removed when it is closed.

        It has no name, so that nothing is left of it, however the process ends.

        Args:
            folder: where it lies; None for the directory for temporary files.
        """
        return cls(tempfile.TemporaryFile(dir=folder), folder)

    def clear(self) -> None:
        """Forget all arrays."""
        self._file.truncate(0)
        self._end = 0

    def append(self, shape: tuple[int, ...]) -> Place:
        """Room for another array, of zeros.

        Raises:
            OSError: the disk has no such room.
        """
        place = Place(self._end, shape)
        try:
            # Without it, a full disk would end the process by a signal when pages are written.
            allocate(self._file, place.offset, place.size)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: the directory has no room for statistics of "
                f"{place.offset + place.size:,} bytes or more",
                str(self._folder or tempfile.gettempdir()),
            ) from error
        self._end += place.size
        return place

    def write(self, place: Place) -> NDArray[np.float32]:
        """An array that changes the file."""
        return self._map(place, "r+")

    def read(self, place: Place) -> NDArray[np.float32]:
        """An array that cannot be written to; it outlives this object."""
        return self._map(place, "r")

    def _map(self, place: Place, mode: Literal["r", "r+"]) -> NDArray[np.float32]:
        return np.memmap(self._file, "<f4", mode, place.offset, place.shape)

    def close(self) -> None:
        self._file.close()
