"""Base classes of picture codecs: a tile becomes a frame of integer samples."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.base import Codec
from torchcodec_weights.codecs.headers.fields import Picture
from torchcodec_weights.codecs.records import EncodedTile, EncoderSettings, FloatArray
from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.tiling import frame_shape, to_frame

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class FrameDecoder(Protocol):
    """Decodes a stream in another process (`isolation.isolated_decoders`)."""

    def __call__(
        self, codec: "SampleCodec", payload: bytes, size: tuple[int, int]
    ) -> tuple[NDArray[Any], int]:
        """What `codec.decode_frame(payload)` returns: a frame of `size` (height, width), its depth.

        Raises:
            CodecError: the stream was not decoded.
        """


_LARGEST_BLOCK = (
    64  # coded height and width are multiples of this or of a divisor of it, in samples
)


def _coded_samples(size: tuple[int, int]) -> int:
    """Samples of a frame (height, width) in whole blocks."""
    height, width = (-(-side // _LARGEST_BLOCK) * _LARGEST_BLOCK for side in size)
    return height * width


class SampleCodec(Codec):
    """A codec of pictures: tiles become frames of integer samples, lossy by a quantizer.

    The standards' quantizers have steps some 12 % apart, too coarse to meet a rate. So a step is a
    product of two factors: the largest integer quantizer that keeps all values within the range of
    the samples, and the affine scale between values and samples, which makes the step exact.

    Attributes:
        device_decoder: decodes its streams on CUDA devices; None if there is no such decoder.
        frame_decoder: decodes the streams of all codecs on the CPU; None for `decode_frame`.
    """

    adapts_steps = True
    device_decoder: ClassVar["DeviceDecoder | None"] = None
    frame_decoder: ClassVar[FrameDecoder | None] = None

    @abstractmethod
    def read_header(self, payload: bytes) -> Picture:
        """Size and depth of the frame that a stream announces, read without the decoder.

        It is called with untrusted bytes, before a decoder allocates the announced frame. So it
        must read the size that the decoder would read, and reject a second frame.

        Raises:
            CodecError: not a stream as this codec's encoder writes it, or more than one frame.
        """

    def check_header(self, payload: bytes, shape: tuple[int, int]) -> Picture:
        """Reject a stream by its headers, before a decoder allocates what they announce.

        Returns:
            What they announce: at least as many samples as the tile has weights.

        Raises:
            CodecError: it cannot be of a tile of `shape` (rows, columns).
        """
        picture = self.read_header(payload)
        count = shape[0] * shape[1]
        if _coded_samples(picture.size) > _coded_samples(frame_shape(count, shape[1])):
            wrong = "many"
        elif picture.height * picture.width < count:
            wrong = "few"
        else:
            return picture
        raise CodecError(
            f"{self.name} stream holds a frame of {picture.width}x{picture.height} samples, "
            f"too {wrong} for a tile of {shape[0]}x{shape[1]} weights"
        )

    @abstractmethod
    def depth(self, settings: EncoderSettings) -> int:
        """Bits per sample that `settings` ask for."""

    @abstractmethod
    def quantizer_steps(self, depth: int) -> Mapping[int, float]:
        """Quantizer parameter to its step in sample units, for those that may be used."""

    @abstractmethod
    def encode_frame(self, frame: NDArray[np.uint16], qp: int, settings: EncoderSettings) -> bytes:
        """Encode a luma frame (height, width) to a stream of its own."""

    @abstractmethod
    def decode_frame(self, payload: bytes) -> tuple[NDArray[Any], int]:
        """Decode one stream, whose header has been checked.

        Returns:
            Samples (height, width), uint8, uint16 or float32, and their depth in bits.

        Raises:
            CodecError: the stream cannot be decoded.
        """

    def decode_checked(self, payload: bytes, size: tuple[int, int]) -> tuple[NDArray[Any], int]:
        """`decode_frame`, in a worker process while `isolated_decoders` is set.

        Args:
            size: height and width of the picture that `check_header` returned.

        Raises:
            CodecError: the stream cannot be decoded, or to another size.
        """
        elsewhere = SampleCodec.frame_decoder
        if elsewhere is not None:
            return elsewhere(self, payload, size)
        frame, depth = self.decode_frame(payload)
        if frame.shape != size:
            raise CodecError(
                f"{self.name} stream announces a frame of {size[1]}x{size[0]} samples and decodes "
                f"to {frame.shape}"
            )
        return frame, depth

    def sample_scale(
        self, step: float, peak: float, settings: EncoderSettings
    ) -> tuple[int, float]:
        """The quantizer parameter and the samples per unit that make up `step`."""
        depth = self.depth(settings)
        limit = (2 ** (depth - 1) - 1) / max(peak, 1e-6)
        steps = self.quantizer_steps(depth)
        usable = [qp for qp, size in steps.items() if size / step <= limit]
        qp = max(usable, key=steps.__getitem__) if usable else min(steps, key=steps.__getitem__)
        return qp, min(steps[qp] / step, limit)

    def step_range(self, peak: float, settings: EncoderSettings) -> tuple[float, float]:
        depth = self.depth(settings)
        limit = (2 ** (depth - 1) - 1) / max(peak, 1e-6)
        sizes = self.quantizer_steps(depth).values()
        # Below one sample per standard deviation, rounding to samples would add to the step.
        return min(sizes) / limit, max(sizes)

    def encode(
        self,
        tile: FloatArray,
        step: float,
        peak: float,
        private: bytes,
        settings: EncoderSettings,
    ) -> EncodedTile:
        qp, scale = self.sample_scale(step, peak, settings)
        unit = float(np.float32(1.0 / scale))
        frame = to_frame(tile, unit, self.depth(settings))
        return EncodedTile(self.encode_frame(frame, qp, settings), unit)

    def decode(
        self, payload: bytes, unit: float, private: bytes, shape: tuple[int, int], out: FloatArray
    ) -> None:
        frame, depth = self.decode_checked(payload, self.check_header(payload, shape).size)
        count = shape[0] * shape[1]
        flat = out.reshape(-1)
        width = frame.shape[1]
        full = count // width
        np.subtract(
            frame[:full],
            np.float32(2 ** (depth - 1)),
            out=flat[: full * width].reshape(full, width),
            dtype=np.float32,
            casting="unsafe",
        )
        if count > full * width:
            flat[full * width :] = frame[full, : count - full * width]
            flat[full * width :] -= 2 ** (depth - 1)
        flat *= np.float32(unit)


class Samples(NamedTuple):
    """Decoded pictures.

    Attributes:
        values: (pictures, pitch), integers of any dtype, on the device. A row begins with the
            samples of a picture, line by line; what follows them has no meaning.
        depth: bits per sample, of all pictures.
    """

    values: "Tensor"
    depth: int


def allocate_pictures(
    pictures: Sequence[Picture], dtype: "torch.dtype", device: "torch.device"
) -> tuple["Tensor", list["Tensor"]]:
    """One buffer for pictures that are restored together, uninitialized.

    Returns:
        The buffer, (pictures, samples of the largest), and the part of it that each picture goes
        to, (height, width).
    """
    import torch  # not where codecs decode in a process of their own

    counts = [picture.height * picture.width for picture in pictures]
    buffer = torch.empty((len(pictures), max(counts)), dtype=dtype, device=device)
    parts = [
        row[:count].view(picture.size)
        for row, count, picture in zip(buffer.unbind(), counts, pictures, strict=True)
    ]
    return buffer, parts


class DeviceDecoder(ABC):
    """Decodes pictures of `SampleCodec`s on CUDA devices, to the samples of `decode_frame`.

    Attributes:
        name: as it shows in `available_codecs()` and in reports.
    """

    name: ClassVar[str]

    @abstractmethod
    def missing(self, codec: SampleCodec, device: "torch.device") -> str | None:
        """Why a device cannot decode a codec: package, driver or chip. None if it can."""

    def refusal(self, codec: SampleCodec, picture: Picture, device: "torch.device") -> str | None:
        """Why such a picture of a supported codec cannot be decoded. None if it can.

        Args:
            picture: from the stream's header, which `codec.check_header` accepts.
        """
        return None

    @abstractmethod
    def decode(
        self,
        codec: SampleCodec,
        payloads: Sequence[bytes],
        pictures: Sequence[Picture],
        device: "torch.device",
    ) -> Samples:
        """Decode streams of one picture each into one buffer (`allocate_pictures`).

        Args:
            payloads: one stream or more.
            pictures: what their headers say, as of `refusal`, which refuses none of them. All are
                of one depth.

        Returns:
            Their pictures, which the current stream may use at once.

        Raises:
            DecoderError: a stream was not decoded, or not to the size of its header.
        """
