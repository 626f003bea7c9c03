"""The names of codecs, known before one is imported: the command line reads arguments by them."""

import warnings
from functools import cache
from importlib.metadata import EntryPoint, entry_points

GROUP = "torchcodec_weights.codecs"
"""The group of entry points through which other packages add codecs."""

BUILT_IN = (
    "ectcq",
    "vvc",
    "hevc",
    "h264",
    "av1",
    "vp9",
    "jpeg",
    "jpeg2000",
    "htj2k",
    "jpegxl",
    "lossless",
)


def described(entry: EntryPoint) -> str:
    """An entry point and its package, for messages."""
    package = entry.dist.name if entry.dist else "unknown"
    return f"entry point {entry.name!r} ({entry.value}) of package {package!r}"


@cache
def entries() -> dict[str, tuple[EntryPoint, ...]]:
    """Entry points of other packages by the name of their codec. None is loaded."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=GROUP):
        if entry.name in BUILT_IN:
            warnings.warn(
                f"{described(entry)} has the name of a codec of package 'torchcodec-weights'; "
                "the latter is used",
                stacklevel=3,
            )
        else:
            found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def codec_names() -> list[str]:
    """Names of all known codecs, available here or not."""
    return [*BUILT_IN, *entries()]


def is_known(name: str) -> bool:
    """Whether there is a codec of a name, available here or not."""
    return name in BUILT_IN or name in entries()
