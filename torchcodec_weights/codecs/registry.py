"""Names to codecs. Others may add theirs through the entry point group `GROUP`."""

from functools import cache
from importlib.metadata import entry_points

from torchcodec_weights.codecs import nvdec, nvimage
from torchcodec_weights.codecs.base import BaseCodec
from torchcodec_weights.codecs.ectcq import ECTCQ
from torchcodec_weights.codecs.image import HTJ2K, JPEG, JPEG2000, JPEGXL
from torchcodec_weights.codecs.lossless import Lossless
from torchcodec_weights.codecs.video import AV1, H264, HEVC, VP9, VVC

GROUP = "torchcodec_weights.codecs"
_BUILT_IN: tuple[type[BaseCodec], ...] = (
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
# Not in the modules of these codecs, which a process that only decodes imports without PyTorch.
for _video in (HEVC, H264, AV1, VP9):
    _video.device_decoder = nvdec.DECODER
for _image in (JPEG, JPEG2000, HTJ2K):
    _image.device_decoder = nvimage.DECODER


@cache
def _codecs() -> dict[str, BaseCodec]:
    codecs: dict[str, BaseCodec] = {kind.name: kind() for kind in _BUILT_IN}
    for entry in entry_points(group=GROUP):
        kind = entry.load()
        if kind.name in codecs:
            raise ValueError(
                f"entry point {entry.value!r} registers the codec {kind.name!r}, which exists"
            )
        codecs[kind.name] = kind()
    return codecs


def codec_names() -> list[str]:
    """Names of all known codecs, available here or not."""
    return list(_codecs())


def get_codec(name: str) -> BaseCodec:
    """The codec of a name.

    Raises:
        ValueError: unknown name; lists the known ones.
    """
    codec = _codecs().get(name) if isinstance(name, str) else None
    if codec is None:
        known = ", ".join(map(repr, codec_names()))
        raise ValueError(f"codec={name!r} is not a known codec; known: {known}")
    return codec
