"""NVIDIA's hardware video decoders, NVDEC, through PyNvVideoCodec.

A chip has several engines that decode independently of its processors. A decoder session runs on
one of them, chosen by the driver, and takes far longer to create than a tile to decode; so sessions
are kept, and each decodes streams of one codec, size and depth. More sessions than engines are in
flight, as a session also copies and waits.

A session writes its picture to memory of its own, which the next picture overwrites. The picture is
copied out of it in the session's CUDA stream, which we create. So the copy precedes the next
picture, and the host never waits.

PyNvVideoCodec is imported when it is used. Even to decode it needs two libraries of the driver that
are not everywhere: without libnvidia-encode.so.1 it cannot be imported, and without libnvcuvid.so.1
it does not say what the chip decodes.
"""

import importlib
import re
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from threading import Lock
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
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

INSTALL = "PyNvVideoCodec is not installed: pip install 'torchcodec-weights[nvdec]'"

_NAMES = {"hevc": "HEVC", "h264": "H264", "vp9": "VP9", "av1": "AV1"}
_MACROBLOCK = 256  # samples; capabilities count pictures in these
_SESSIONS_PER_ENGINE = 2
_IDLE_SESSIONS = 32


@cache
def pynvvideocodec() -> tuple[Any, str | None]:
    """The module PyNvVideoCodec, or None and why it cannot be imported."""
    try:
        return importlib.import_module("PyNvVideoCodec"), None
    except ModuleNotFoundError as error:
        return None, INSTALL if error.name == "PyNvVideoCodec" else _explained(error)
    except Exception as error:  # RuntimeError without libnvidia-encode
        return None, _explained(error)


# What the loader of the system says, which is somewhere in every message about a missing library.
_MISSING_LIBRARY = re.compile(r"(lib(?:nvidia-encode|nvcuvid)\.so[.\d]*): cannot open")


def _explained(error: Exception) -> str:
    """What a user is told where PyNvVideoCodec cannot be used: what is missing, and what to do."""
    library = _MISSING_LIBRARY.search(str(error))
    if library is None:
        return f"PyNvVideoCodec cannot be used: {_first_paragraph(error)}"
    return (
        f"PyNvVideoCodec does not find {library[1]}, a library of NVIDIA's driver: install the "
        "driver's libraries for video encoding and decoding, or start the container with "
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
    )


def _first_paragraph(error: Exception) -> str:
    """An error's message, in one line, without the advice and the lines of source after it."""
    return " ".join(str(error).strip().split("\n\n", 1)[0].split())


class Capabilities(NamedTuple):
    """What a chip's engines decode of one codec, 4:2:0, at one depth.

    Attributes:
        supported: whether they decode it at all; the rest is zero if not.
        engines: how many there are.
        min_width, max_width, min_height, max_height: of the coded picture.
        max_macroblocks: of the coded picture, 16 × 16 samples each.
    """

    supported: bool
    engines: int
    min_width: int
    max_width: int
    min_height: int
    max_height: int
    max_macroblocks: int

    def refusal(self, picture: Picture) -> str | None:
        """Why such a picture is not decoded, or None if it is."""
        if not self.supported:
            return f"the chip does not decode it at {picture.depth} bits"
        width, height = picture.coded_width, picture.coded_height
        if not (
            self.min_width <= width <= self.max_width
            and self.min_height <= height <= self.max_height
            and -(-width * height // _MACROBLOCK) <= self.max_macroblocks
        ):
            return (
                f"a tile's picture is {width}x{height}, and the chip takes "
                f"{self.min_width}x{self.min_height} to {self.max_width}x{self.max_height}"
            )
        return None


@cache
def _capabilities(codec: str, depth: int, index: int) -> Capabilities:
    # PyNvVideoCodec queries the first device for any index. If another device supports less, making
    # a decoder fails there, and the CPU decodes.
    nvc, _ = pynvvideocodec()
    found = nvc.GetDecoderCaps(
        gpuid=index,
        codec=getattr(nvc.cudaVideoCodec, _NAMES[codec]),
        chromaformat=getattr(nvc.cudaVideoChromaFormat, "420"),
        bitdepth=depth,
    )
    return Capabilities(
        bool(found["supported"]),
        found["num_decoder_engines"],
        found["width_min"],
        found["width_max"],
        found["height_min"],
        found["height_max"],
        found["mb_num_max"],
    )


T = TypeVar("T")


class IdlePool(Generic[T]):
    """Objects that take long to create, kept for reuse.

    Args:
        create: creates an object of a kind.
        limit: most idle objects; beyond it, those idle for longest are dropped.
    """

    def __init__(self, create: Callable[[Any], T], limit: int) -> None:
        self._create = create
        self._limit = limit
        self._lock = Lock()
        self._idle: list[tuple[Hashable, T]] = []

    def take(self, kind: Hashable) -> T:
        """The last used idle object of a kind, or a new one."""
        with self._lock:
            for position in reversed(range(len(self._idle))):
                if self._idle[position][0] == kind:
                    return self._idle.pop(position)[1]
        return self._create(kind)

    def give_back(self, kind: Hashable, item: T) -> None:
        """Return an object from `take`. An object that has failed must not be returned."""
        with self._lock:
            self._idle.append((kind, item))
            dropped = self._idle[: -self._limit]
            del self._idle[: -self._limit]
        del dropped  # not under the lock: destroying a decoder takes a while


class _Kind(NamedTuple):
    codec: str
    picture: Picture
    device: int


class _Session:
    """A decoder of streams of one kind, and the CUDA stream that it works in."""

    def __init__(self, kind: _Kind) -> None:
        nvc, _ = pynvvideocodec()
        self._picture = kind.picture
        self._stream = torch.cuda.Stream(kind.device)
        self._decoder = nvc.CreateDecoder(
            gpuid=kind.device,
            codec=getattr(nvc.cudaVideoCodec, _NAMES[kind.codec]),
            cudastream=self._stream.cuda_stream,
            usedevicememory=True,
            latency=nvc.DisplayDecodeLatencyType.ZERO,
        )

    def decode(self, payload: bytes, out: Tensor, free: torch.cuda.Event) -> torch.cuda.Event:
        """Decode a stream into `out`, once `free` has passed.

        Args:
            payload: a stream of one picture.
            out: (height, width), uint8 for 8 bits, int16 for 10: as the engine writes it, in the
                upper bits.

        Returns:
            An event that passes when `out` is written.

        Raises:
            DecoderError: not exactly one picture of the expected size came out.
        """
        # An empty packet ends the stream, for parsers that wait for the next picture.
        frames = self._feed(payload) or self._feed(b"")
        height, width = out.shape
        if len(frames) != 1:
            raise DecoderError(f"NVDEC made {len(frames)} pictures of a stream, not one")
        with torch.cuda.stream(self._stream):
            surface = from_dlpack(frames[0])  # luma, and below it half as much chroma
            expected = torch.uint8 if self._picture.depth == 8 else torch.uint16
            if surface.dtype != expected or surface.shape != (height * 3 // 2, width):
                raise DecoderError(
                    f"NVDEC made a surface of {tuple(surface.shape)}, {surface.dtype}, of a "
                    f"picture of {width}x{height}, {self._picture.depth} bits"
                )
            self._stream.wait_event(free)
            out.copy_(surface[:height].view(out.dtype))
            return self._stream.record_event()

    def _feed(self, data: bytes) -> list[Any]:
        nvc, _ = pynvvideocodec()
        buffer = np.frombuffer(data, np.uint8)
        packet = nvc.PacketData()
        packet.bsl = len(buffer)
        packet.bsl_data = buffer.ctypes.data if len(buffer) else 0
        if len(buffer):
            packet.decode_flag = int(nvc.VideoPacketFlag.ENDOFPICTURE)
        try:
            return list(self._decoder.Decode(packet))
        except Exception as error:  # its exceptions have no base class of their own
            raise DecoderError(f"NVDEC failed: {_first_paragraph(error)}") from error


def _create_session(kind: _Kind) -> _Session:
    try:
        return _Session(kind)
    except Exception as error:  # as above
        raise DecoderError(f"NVDEC makes no decoder: {_first_paragraph(error)}") from error


_sessions: IdlePool[_Session] = IdlePool(_create_session, _IDLE_SESSIONS)


@cache
def _threads(sessions: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(sessions, thread_name_prefix="torchcodec_weights-nvdec")


def surface_dtype(depth: int) -> torch.dtype:
    """Of the samples that engines write: uint8, or int16 with the bits of unsigned numbers.

    PyTorch has no arithmetic and no indexing of uint16 on CUDA devices.
    """
    return torch.uint8 if depth == 8 else torch.int16


def unpack_(surfaces: Tensor, depth: int) -> Tensor:
    """Turn surfaces to numbers in place: engines write 10 bits to the upper ones of 16.

    Args:
        surfaces: of `surface_dtype`.
    """
    if depth == 8:
        return surfaces
    return surfaces.bitwise_right_shift_(16 - depth).bitwise_and_(2**depth - 1)


class NVDEC(DeviceDecoder):
    """Decodes `hevc`, `h264`, `vp9` and `av1` on the engines of the chip, as far as it has them."""

    name: ClassVar[str] = "NVDEC (PyNvVideoCodec)"

    def missing(self, codec: SampleCodec, device: torch.device) -> str | None:
        module, reason = pynvvideocodec()
        if module is None:
            return reason
        try:
            able = any(
                _capabilities(codec.name, depth, device.index).supported
                for depth in codec.bit_depths
            )
        except Exception as error:  # RuntimeError without libnvcuvid
            return _explained(error)
        return None if able else "the chip does not decode it"

    def refusal(self, codec: SampleCodec, picture: Picture, device: torch.device) -> str | None:
        return _capabilities(codec.name, picture.depth, device.index).refusal(picture)

    def decode(
        self,
        codec: SampleCodec,
        payloads: Sequence[bytes],
        pictures: Sequence[Picture],
        device: torch.device,
    ) -> Samples:
        depth = pictures[0].depth
        buffer, surfaces = allocate_pictures(pictures, surface_dtype(depth), device)
        stream = torch.cuda.current_stream(device)
        free = stream.record_event()  # that memory may have been used in this stream

        def decode(number: int) -> torch.cuda.Event:
            kind = _Kind(codec.name, pictures[number], device.index)
            # Device and mode are per thread: tensors made in inference mode could not be written.
            with torch.cuda.device(device), torch.no_grad():
                session = _sessions.take(kind)
                done = session.decode(payloads[number], surfaces[number], free)
            _sessions.give_back(kind, session)
            return done

        engines = _capabilities(codec.name, depth, device.index).engines
        threads = _threads(_SESSIONS_PER_ENGINE * max(engines, 1))
        futures = [threads.submit(decode, number) for number in range(len(payloads))]
        wait(futures)  # all of them, before an exception frees memory that they write
        for future in futures:
            if future.exception() is None:
                stream.wait_event(future.result())
        for future in futures:
            future.result()
        return Samples(unpack_(buffer, depth), depth)


DECODER = NVDEC()
