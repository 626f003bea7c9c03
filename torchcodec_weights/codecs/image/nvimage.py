"""JPEG 2000 and HTJ2K on NVIDIA GPUs, through nvImageCodec (nvJPEG2000), in batches of tiles.

Both are coded without loss, so every decoder returns the same samples.
"""

import importlib
from collections.abc import Sequence
from functools import cache
from threading import Lock
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from torchcodec_weights.codecs.pictures import DeviceDecoder, SampleCodec, Samples
from torchcodec_weights.errors import DecoderError

INSTALL = "nvImageCodec is not installed: pip install 'torchcodec-weights[nvimage]'"


@cache
def nvimgcodec() -> tuple[Any, str | None]:
    """The module nvidia.nvimgcodec, or None and why it cannot be imported."""
    try:
        return importlib.import_module("nvidia.nvimgcodec"), None
    except ImportError as error:
        if error.name in ("nvidia", "nvidia.nvimgcodec"):
            return None, INSTALL
        return None, f"nvImageCodec cannot be imported: {error}"
    except Exception as error:  # whatever a driver may have to do with it
        return None, f"nvImageCodec cannot be imported: {error}"


@cache
def _decoder(index: int) -> tuple[Any, Lock]:
    """The decoder of a device, and its lock: it decodes one batch at a time."""
    module, _ = nvimgcodec()
    kinds = module.BackendKind
    # All but the CPU, where our own decoders are.
    backends = [
        module.Backend(kind) for kind in (kinds.HW_GPU_ONLY, kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU)
    ]
    return module.Decoder(device_id=index, backends=backends), Lock()


def decode_params() -> Any:
    """Parameters for gray samples as they are coded: neither scaled to 8 bits nor rotated."""
    module, _ = nvimgcodec()
    return module.DecodeParams(
        apply_exif_orientation=False,
        allow_any_depth=True,
        color_spec=module.ColorSpec.GRAY,
        sample_format=module.SampleFormat.P_Y,
    )


def samples_of(codec: str, picture: Tensor) -> Samples:
    """Samples as the codec's decoder on the CPU returns them.

    Args:
        picture: (1, height, width) or (height, width), uint8 or uint16, of the whole stream.

    Raises:
        DecoderError: another number of dimensions, or another type.
    """
    if picture.dim() == 3 and picture.shape[0] == 1:
        picture = picture[0]
    if picture.dim() != 2 or picture.dtype not in (torch.uint8, torch.uint16):
        raise DecoderError(
            f"nvImageCodec made {picture.dtype} {tuple(picture.shape)} of a {codec} stream"
        )
    depth = 8 * picture.element_size()
    if depth == 16:
        picture = picture.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
    if codec == "htj2k":
        # The low-pass band: as the high-pass bands are empty, it is the samples at even positions.
        picture = picture[::2, ::2]
    return Samples(picture, depth)


class NvImageCodec(DeviceDecoder):
    """Decodes `jpeg2000` and `htj2k` on the GPU."""

    name: ClassVar[str] = "nvImageCodec"

    def missing(self, codec: SampleCodec, device: torch.device) -> str | None:
        return nvimgcodec()[1]

    def decode(
        self, codec: SampleCodec, payloads: Sequence[bytes], device: torch.device
    ) -> list[Samples]:
        module, _ = nvimgcodec()
        params = decode_params()
        stream = torch.cuda.current_stream(device)
        try:
            decoder, lock = _decoder(device.index)
            streams = [module.CodeStream(payload) for payload in payloads]
            with lock:
                images = decoder.decode(streams, params=params, cuda_stream=stream.cuda_stream)
        except Exception as error:  # its exceptions have no base class of their own
            raise DecoderError(f"nvImageCodec failed: {error}") from error
        failed = sum(image is None for image in images)
        if failed or len(images) != len(payloads):
            raise DecoderError(f"nvImageCodec does not decode {failed} of {len(payloads)} streams")
        # Copied, as the library owns an image's memory and does not know our streams.
        return [samples_of(codec.name, from_dlpack(image).clone()) for image in images]


DECODER = NvImageCodec()
