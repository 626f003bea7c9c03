"""Escaped errors, warnings and log records for the terminal."""

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torchcodec_weights.system.terminal import printable

# Select Graphic Rendition (ECMA-48, 8.3.117): transformers colours its tables.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def show(kind: str, message: object) -> None:
    """Write a line, "error" or "warning", to standard error."""
    print(_line(kind, message), end="", file=sys.stderr)


@contextmanager
def escaped_messages() -> Iterator[None]:
    """Escape warnings and log records, as they may contain names from files."""
    formatted, factory = warnings.formatwarning, logging.getLogRecordFactory()
    warnings.formatwarning = _format_warning
    logging.setLogRecordFactory(_Record)
    try:
        yield
    finally:
        warnings.formatwarning = formatted
        logging.setLogRecordFactory(factory)


class _Record(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802 - logging's name
        lines = _COLOUR.sub("", super().getMessage()).split("\n")
        return "\n".join(map(printable, lines))


def _format_warning(message: Warning | str, *_args: Any, **_options: Any) -> str:
    return _line("warning", message)


def _line(kind: str, message: object) -> str:
    return f"torchcodec-weights: {kind}: {printable(str(message))}\n"
