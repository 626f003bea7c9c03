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

from torchcodec_weights.codecs.headers.fields import Picture
from torchcodec_weights.codecs.pictures import (
    DeviceDecoder,
    SampleCodec,
    Samples,
    allocate_pictures,
)
from torchcodec_weights.errors import DecoderError

# By depth, as the library delivers samples and as they are kept: PyTorch has no arithmetic and no
# indexing of uint16 on CUDA devices.
_IMAGE_DTYPES = {8: torch.uint8, 16: torch.uint16}
_SURFACE_DTYPES = {8: torch.uint8, 16: torch.int16}

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


def frame_of(codec: str, image: Tensor, picture: Picture) -> Tensor:
    """The frame in a decoded image.

    Args:
        image: (1, height, width) or (height, width), uint8 or uint16, of the whole stream.
        picture: what the stream's header says of the frame.

    Returns:
        A view of `image` of the picture's size, uint8, or int16 with the bits of unsigned numbers.

    Raises:
        DecoderError: the image is not of this size or depth.
    """
    frame = image[0] if image.dim() == 3 and image.shape[0] == 1 else image
    if codec == "htj2k" and frame.dim() == 2:
        # The low-pass band: as the high-pass bands are empty, it is the samples at even positions.
        frame = frame[::2, ::2]
    if frame.shape != picture.size or frame.dtype != _IMAGE_DTYPES[picture.depth]:
        raise DecoderError(
            f"nvImageCodec made {image.dtype} {tuple(image.shape)} of a {codec} stream"
        )
    return frame.view(_SURFACE_DTYPES[picture.depth])


def unpack(surfaces: Tensor, depth: int) -> Tensor:
    """Surfaces as numbers: int16 with the bits of unsigned numbers becomes int32."""
    return surfaces if depth == 8 else surfaces.to(torch.int32).bitwise_and_(0xFFFF)


class NvImageCodec(DeviceDecoder):
    """Decodes `jpeg2000` and `htj2k` on the GPU."""

    name: ClassVar[str] = "nvImageCodec"

    def missing(self, codec: SampleCodec, device: torch.device) -> str | None:
        return nvimgcodec()[1]

    def decode(
        self,
        codec: SampleCodec,
        payloads: Sequence[bytes],
        pictures: Sequence[Picture],
        device: torch.device,
    ) -> Samples:
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
        depth = pictures[0].depth
        buffer, surfaces = allocate_pictures(pictures, _SURFACE_DTYPES[depth], device)
        # Copied, as the library owns an image's memory and does not know our streams.
        for image, picture, surface in zip(images, pictures, surfaces, strict=True):
            surface.copy_(frame_of(codec.name, from_dlpack(image), picture))
        return Samples(unpack(buffer, depth), depth)


DECODER = NvImageCodec()
