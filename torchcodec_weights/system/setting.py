"""Process-wide settings that take effect at once and can be undone."""

from collections.abc import Callable
from typing import Self


class Setting:
    """A setting that was made; as a context manager it is undone at the end.

    Args:
        undo: restores the former setting.
    """

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo = undo

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._undo()
