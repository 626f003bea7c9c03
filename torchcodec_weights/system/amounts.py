"""Amounts of memory, as people write them."""

import re
from decimal import Decimal

_PREFIXES = "KMGT"
_AMOUNT = re.compile(rf"(\d+(?:\.\d+)?)\s*(?:([{_PREFIXES}])(i?))?B", re.ASCII | re.IGNORECASE)


def bytes_of(text: str) -> int:
    """Bytes of "2 GiB", "1.5GB", "800 B"; the units of 1024 have an i.

    Raises:
        ValueError: it is no such text, or 0.
    """
    match = _AMOUNT.fullmatch(text.strip())
    if match:
        number, prefix, binary = match.groups()
        power = 0 if prefix is None else _PREFIXES.index(prefix.upper()) + 1
        if amount := int(Decimal(number) * (1024 if binary else 1000) ** power):
            return amount
    raise ValueError(f"{text!r}: allowed: an amount above 0 with its unit, like '2 GiB', '1.5GB'")
