"""Amounts of memory as users give them: numbers, or text with a unit."""

import re
import reprlib
from decimal import Decimal
from numbers import Real
from typing import Any

_PREFIXES = "KMGT"
_AMOUNT = re.compile(rf"(\d+(?:\.\d+)?)\s*(?:([{_PREFIXES}])(i?))?B", re.ASCII | re.IGNORECASE)


def byte_count(name: str, amount: Any, *, zero: str) -> int:
    """Bytes of an amount of memory.

    Args:
        name: of the argument, for the error.
        amount: a number, or text with one of the units B, KB, MB, GB and TB of 1000, KiB, MiB, GiB
            and TiB of 1024 of the one before.
        zero: what 0 means, for the error.

    Raises:
        ValueError: `amount` is negative, not finite, or no such text.
    """
    if isinstance(amount, str) and (match := _AMOUNT.fullmatch(amount.strip())):
        number, prefix, binary = match.groups()
        power = 0 if prefix is None else _PREFIXES.index(prefix.upper()) + 1
        return int(Decimal(number) * (1024 if binary else 1000) ** power)
    number_given = isinstance(amount, Real) and not isinstance(amount, bool)
    if number_given and 0 <= amount < float("inf"):
        return int(amount)
    raise ValueError(
        f"{name}={reprlib.repr(amount)}: allowed: 0 ({zero}) and finite numbers above, or text "
        "like '2 GiB', '1.5GB'"
    )
