"""Rows of measurements in a JSON file, written one by one, so that a later run can continue."""

import json
from pathlib import Path
from typing import Any

from torchcodec_weights.system.files import unfinished

Row = dict[str, Any]


class Rows:
    """The rows of a JSON file, an array of objects.

    Args:
        path: read if it exists, and rewritten after each `add`; None to keep rows only in memory.
        argument: name of the command-line option for `path`, for error messages.

    Raises:
        ValueError: `path` holds something else, or its directory does not exist.
    """

    def __init__(self, path: Path | None, argument: str = "--json") -> None:
        self._path = path
        self._rows = [] if path is None else _read(path, argument)

    def find(self, key: Row) -> Row | None:
        """The first row that has these values; None if there is none."""
        return next((row for row in self._rows if key.items() <= row.items()), None)

    def add(self, row: Row) -> None:
        """Append a row and write the file."""
        self._rows.append(row)
        if self._path is not None:
            with unfinished(self._path) as temporary:
                temporary.write_text(json.dumps(self._rows, indent=1) + "\n")


def _read(path: Path, argument: str) -> list[Row]:
    if not path.exists():
        if not path.resolve().parent.is_dir():
            raise ValueError(
                f"{argument}={str(path)!r}: allowed: a name in a directory that exists"
            )
        return []
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError):
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"{argument}={str(path)!r}: allowed: a new name, or a JSON array of objects"
        )
    return rows
