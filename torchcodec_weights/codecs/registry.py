"""The table of codecs by name; those of other packages are loaded when they are asked for."""

from functools import cache

from torchcodec_weights.codecs.base import BaseCodec
from torchcodec_weights.codecs.ectcq import ECTCQ
from torchcodec_weights.codecs.image.jpeg import JPEG
from torchcodec_weights.codecs.image.jpeg2000 import HTJ2K, JPEG2000
from torchcodec_weights.codecs.image.jpegxl import JPEGXL
from torchcodec_weights.codecs.lossless import Lossless
from torchcodec_weights.codecs.names import codec_names, described, entries
from torchcodec_weights.codecs.records import CodecInfo
from torchcodec_weights.codecs.video.av1 import AV1
from torchcodec_weights.codecs.video.vp9 import VP9
from torchcodec_weights.codecs.video.vvc import VVC
from torchcodec_weights.codecs.video.x26x import H264, HEVC
from torchcodec_weights.errors import CodecUnavailableError
from torchcodec_weights.system.package import import_package

_BUILT_IN: dict[str, BaseCodec] = {
    kind.name: kind()
    for kind in (
        ECTCQ,
        VVC,
        HEVC,
        H264,
        AV1,
        VP9,
        JPEG,
        JPEG2000,
        HTJ2K,
        JPEGXL,
        Lossless,
    )
}


@cache
def _loaded(name: str) -> BaseCodec:
    """The codec of an entry point.

    Raises:
        CodecUnavailableError: it cannot be loaded, or several packages have one of this name.
    """
    entry, *others = entries()[name]
    if others:
        several = " and ".join(map(described, (entry, *others)))
        raise CodecUnavailableError(
            f"codec {name!r} is registered more than once: {several}; uninstall all but one"
        )
    import_package()  # whose names the codec's module imports
    # A package of someone else may raise anything while it is imported.
    try:
        kind = entry.load()
        if not (isinstance(kind, type) and issubclass(kind, BaseCodec)):
            raise TypeError(f"{kind!r} is not a class derived from BaseCodec")
        if kind.name != name:
            raise ValueError(f"its codec is named {kind.name!r}; both names must be the same")
        return kind()
    except Exception as error:
        raise CodecUnavailableError(
            f"codec {name!r}: {described(entry)} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def get_codec(name: str) -> BaseCodec:
    """The codec of a name. Of the codecs of other packages, only this one is loaded.

    Raises:
        ValueError: unknown name; lists the known ones.
        CodecUnavailableError: the package that registers it cannot be loaded, or several packages
            register the name; names them.
    """
    if isinstance(name, str):
        if name in _BUILT_IN:
            return _BUILT_IN[name]
        if name in entries():
            return _loaded(name)
    known = ", ".join(map(repr, codec_names()))
    raise ValueError(f"codec={name!r} is not a known codec; known: {known}")


def codec_info(name: str) -> CodecInfo:
    """What a known codec can do on this machine.

    A codec that cannot be loaded, or whose `info` raises, has no encoder and no decoders and counts
    as lossy; `missing` is the reason.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name].info()
    try:
        return get_codec(name).info()
    except Exception as error:  # of someone else's package, so of any kind
        missing = str(error)
        if not isinstance(error, CodecUnavailableError):
            what = f"{type(error).__name__}: {error}"
            missing = f"info() of {described(entries()[name][0])} raised {what}"
        return CodecInfo(name, "unknown", lossy=True, encoder=None, decoders={}, missing=missing)
