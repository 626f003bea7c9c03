"""Limits on files: which codecs may decode them, and how far they may expand.

Both settings are for the whole process and are checked when a weight is opened; a weight that is
already open is not checked again. docs/security.md has the reasons.
"""

import os
from collections.abc import Iterable
from functools import partial
from numbers import Integral

from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.container import Header
from torchcodec_weights.system.setting import Setting

CODECS_VARIABLE = "TORCHCODEC_WEIGHTS_ALLOWED_CODECS"
EXPANSION_VARIABLE = "TORCHCODEC_WEIGHTS_MAX_EXPANSION"

MAX_EXPANSION = 2**14
"""Weights per stored byte. A tile has about 2^18 weights, a payload and 16 bytes in the tile table.
The most that encoders reach is 10,512, for a matrix of zeros (`av1`, 2048 × 4096)."""

FREE_WEIGHTS = 2**24
"""Weights that a container of any size may expand to: 64 MiB of float32."""


def _codecs_of(names: str | None) -> frozenset[str] | None:
    """The codecs listed in an environment variable; None for all, if it is not set."""
    if names is None:
        return None
    return frozenset(name.strip() for name in names.split(",") if name.strip())


def _expansion_of(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{EXPANSION_VARIABLE}={text!r}: allowed: an integer above 0")
    return int(text)


_codecs = _codecs_of(os.environ.get(CODECS_VARIABLE))
_expansion = _expansion_of(os.environ.get(EXPANSION_VARIABLE, str(MAX_EXPANSION)))


def _set_codecs(names: frozenset[str] | None) -> None:
    global _codecs
    _codecs = names


def _set_expansion(weights_per_byte: int) -> None:
    global _expansion
    _expansion = weights_per_byte


def check_codec(name: str, allowed: Iterable[str] | None = None) -> None:
    """Refuse a codec that may not decode files.

    Args:
        name: of the codec.
        allowed: names of codecs, a second limit beside the process's; None for no second limit.

    Raises:
        CodecError: names the codec and those that are allowed.
    """
    for names, where in ((_codecs, f"allowed_codecs() or {CODECS_VARIABLE}"), (allowed, None)):
        if names is not None and name not in names:
            known = ", ".join(map(repr, sorted(names))) or "none"
            says = f", as {where} says" if where else ""
            raise CodecError(
                f"encoded with the codec {name!r}, by which files may not be decoded here: "
                f"allowed: {known}{says}"
            )


def check_expansion(header: Header, stored: int) -> None:
    """Refuse a container that holds more weights for its stored bytes than the limit.

    Args:
        stored: bytes of container and scales.

    Raises:
        CodecError: names the numbers, and how to open it despite the limit.
    """
    allowed = max(FREE_WEIGHTS, _expansion * stored)
    if header.rows * header.cols > allowed and (weights := header.present_weights) > allowed:
        raise CodecError(
            f"{stored:,} bytes hold {weights:,} weights, more than {_expansion:,} a byte: no "
            "encoder writes that. To open it all the same, set max_expansion() or "
            f"{EXPANSION_VARIABLE}"
        )


class allowed_codecs(Setting):  # noqa: N801 - used as a function
    """Set the codecs that may decode files, for the whole process.

    For files from strangers `allowed_codecs(["ectcq", "lossless"])` is recommended: then no other
    codec's decoder reads a byte of them (docs/security.md). As a context manager it restores the
    former setting at the end. The default is the environment variable
    TORCHCODEC_WEIGHTS_ALLOWED_CODECS, names separated by commas; if it is not set, all codecs.

    Args:
        names: of codecs; None for all.

    Raises:
        ValueError: there is no such codec.
    """

    def __init__(self, names: Iterable[str] | None) -> None:
        chosen = None if names is None else check_names(names)
        super().__init__(partial(_set_codecs, _codecs))
        _set_codecs(chosen)


class max_expansion(Setting):  # noqa: N801 - used as a function
    """Set how many weights a file may hold for each stored byte, for the whole process.

    Containers beyond the limit are refused before memory is allocated for them. Containers of up to
    2^24 weights are always accepted. As a context manager it restores the former setting at the
    end. The default is the environment variable TORCHCODEC_WEIGHTS_MAX_EXPANSION; if it is not set,
    16,384.

    Args:
        weights_per_byte: an integer above 0.

    Raises:
        ValueError: it is not one.
    """

    def __init__(self, weights_per_byte: int) -> None:
        if (
            isinstance(weights_per_byte, bool)
            or not isinstance(weights_per_byte, Integral)
            or weights_per_byte < 1
        ):
            raise ValueError(f"weights_per_byte={weights_per_byte!r}: allowed: an integer above 0")
        super().__init__(partial(_set_expansion, _expansion))
        _set_expansion(weights_per_byte)


def check_names(names: Iterable[str]) -> frozenset[str]:
    """Names of codecs as a set.

    Raises:
        ValueError: there is no such codec, or `names` is one name and not several.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ValueError(f"allowed_codecs={names!r}: allowed: a list of names of codecs")
    chosen = frozenset(names)
    for name in chosen:
        get_codec(name)
    return chosen
