"""FFmpeg in two forms: PyAV in this process, and the program that imageio-ffmpeg installs.

PyAV decodes every standard here and encodes most; libvvenc and libaom are only in the program.
Both packages are optional: nothing is imported before it is used.
"""

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.errors import CodecError, CodecUnavailableError

PIX_FMT = {8: "yuv420p", 10: "yuv420p10le"}
"""4:2:0 with constant chroma, the only format of libvvenc and of the hardware decoders. The chroma
costs a few bytes a frame."""

INSTALL_PYAV = "PyAV is not installed: pip install av"
INSTALL_PROGRAM = "the ffmpeg program is not installed: pip install imageio-ffmpeg"


@cache
def pyav() -> ModuleType | None:
    """The module `av`, or None where it cannot be imported."""
    try:
        import av
        import av.error
        import av.logging
    except ImportError:
        return None
    av.logging.set_level(None)  # decoders log what the exception says
    return av


@cache
def program() -> str | None:
    """Path of the ffmpeg program, or None where imageio-ffmpeg has none."""
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return None


@cache
def program_encoders() -> frozenset[str]:
    """Names of the encoders that the program was built with."""
    path = program()
    if path is None:
        return frozenset()
    listing = subprocess.run([path, "-hide_banner", "-encoders"], capture_output=True, text=True)
    lines = listing.stdout.splitlines()
    return frozenset(line.split()[1] for line in lines if line.startswith(" V"))


def pyav_has(codec: str, mode: str) -> bool:
    """Whether PyAV's FFmpeg has a decoder (mode "r") or an encoder ("w") of this name."""
    av = pyav()
    if av is None:
        return False
    try:
        return bool(av.codec.Codec(codec, mode).name == codec)
    except av.error.FFmpegError:
        return False
    except ValueError:  # UnknownCodecError
        return False


def planar_bytes(frame: NDArray[np.uint16], depth: int) -> bytes:
    """A luma frame as raw 4:2:0 bytes with mid-gray chroma, in `PIX_FMT[depth]`."""
    kind = np.dtype("<u2" if depth > 8 else "u1")
    chroma = np.full(frame.size // 2, 2 ** (depth - 1), kind)
    return frame.astype(kind).tobytes() + chroma.tobytes()


class RunningPrograms:
    """Encoder processes of one call, which an interrupt kills instead of waiting for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._killed = False

    @contextlib.contextmanager
    def track(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        with self._lock:
            self._processes.add(process)
            if self._killed:
                process.kill()
        try:
            yield
        finally:
            with self._lock:
                self._processes.discard(process)

    def kill(self) -> None:
        """Kill all processes, and those started later; their callers raise CodecError."""
        with self._lock:
            self._killed = True
            for process in self._processes:
                process.kill()


running: ContextVar[RunningPrograms] = ContextVar("running", default=RunningPrograms())  # noqa: B039


def encode_with_program(
    encoder: str,
    options: Sequence[str],
    muxer: str,
    frame: NDArray[np.uint16],
    depth: int,
) -> bytes:
    """Encode a frame in one run of the program, one thread.

    Returns:
        The stream in the format `muxer`.

    Raises:
        CodecUnavailableError: the program is not installed or lacks this encoder.
        CodecError: the program failed; holds what it said.
    """
    path = program()
    if path is None:
        raise CodecUnavailableError(INSTALL_PROGRAM)
    height, width = frame.shape
    # fmt: off
    command = [
        path, "-hide_banner", "-loglevel", "error", "-nostdin",
        "-f", "rawvideo", "-pix_fmt", PIX_FMT[depth], "-s", f"{width}x{height}", "-r", "1",
        "-i", "pipe:0", "-an", "-c:v", encoder, "-threads", "1", *options, "-f", muxer, "pipe:1",
    ]
    # fmt: on
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process, running.get().track(process):
        try:
            output, errors = process.communicate(planar_bytes(frame, depth))
        except BaseException:
            process.kill()
            raise
    # libvvenc can fail and still leave bytes, so the exit status decides.
    if process.returncode != 0:
        said = errors.decode(errors="replace").strip()[-800:]
        raise CodecError(f"{encoder} failed with status {process.returncode}: {said}")
    return output


def encode_with_pyav(
    encoder: str,
    options: dict[str, str],
    samples: NDArray[np.uint16],
    depth: int,
) -> bytes:
    """Encode a frame in this process, one thread.

    Raises:
        CodecUnavailableError: PyAV is not installed.
        CodecError: the encoder failed, or did not make one packet of the frame.
    """
    av = pyav()
    if av is None:
        raise CodecUnavailableError(INSTALL_PYAV)
    height, width = samples.shape
    try:
        context = av.codec.CodecContext.create(encoder, "w")
        context.width, context.height = width, height
        context.pix_fmt = PIX_FMT[depth]
        context.time_base = context.framerate = 1
        context.thread_count = 1
        context.gop_size = 1
        context.max_b_frames = 0
        context.options = options
        open_encoder(context)
        frame = _av_frame(av, samples, depth)
        frame.pts = 0
        packets = [*context.encode(frame), *context.encode(None)]
    except (av.error.FFmpegError, ValueError) as error:
        raise CodecError(f"{encoder} failed: {error}") from error
    if len(packets) != 1:
        raise CodecError(f"{encoder} made {len(packets)} packets of a frame; check encoder_params")
    return bytes(packets[0])


def open_encoder(context: Any) -> None:
    """Open a context; its threads, and the calling one, keep the scheduling that this one has.

    SVT-AV1 gives them the highest real-time priority where it may, as root. The calling thread and
    those that it starts, PyTorch's among them, would have it from then on, and leave no time to
    other programs.

    Raises:
        av.error.FFmpegError, ValueError: as `context.open`.
    """
    if not hasattr(os, "sched_getscheduler"):  # not Linux
        context.open()
        return
    before = _threads()
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        context.open()
    finally:
        for thread in {0} | _threads() - before:
            with contextlib.suppress(OSError):  # it has ended
                if os.sched_getscheduler(thread) != policy:
                    os.sched_setscheduler(thread, policy, parameters)


def _threads() -> set[int]:
    """Linux's numbers of this process's threads."""
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}


def _av_frame(av: Any, samples: NDArray[np.uint16], depth: int) -> Any:
    frame = av.VideoFrame(samples.shape[1], samples.shape[0], PIX_FMT[depth])
    kind = np.dtype("<u2" if depth > 8 else "u1")
    for index, plane in enumerate(frame.planes):
        target = np.frombuffer(plane, kind).reshape(plane.height, -1)
        if index == 0:
            target[:, : plane.width] = samples
        else:
            target[:] = 2 ** (depth - 1)
    return frame


_ALIGNMENT = 128  # FFmpeg rounds height and width up to multiples of at most this, in samples


def decode_luma(decoder: str, payload: bytes, coded: tuple[int, int]) -> tuple[NDArray[Any], int]:
    """Decode a stream of one frame: luma samples (height, width), bits per sample.

    PyAV decodes all frames of a packet before it returns the first, so the caller must have checked
    that there is one.

    Args:
        coded: height and width of the coded picture; a decoder that finds a larger one fails before
            it allocates it.

    Raises:
        CodecUnavailableError: PyAV is not installed.
        CodecError: not exactly one frame of gray or 4:2:0 samples comes out.
    """
    av = pyav()
    if av is None:
        raise CodecUnavailableError(INSTALL_PYAV)
    try:
        context = av.codec.CodecContext.create(decoder, "r")
        context.thread_count = 1
        height, width = (-(-side // _ALIGNMENT) * _ALIGNMENT for side in coded)
        context.options = {"max_pixels": str(height * width)}
        frames = [*context.decode(av.Packet(payload)), *context.decode(None)]
    except (av.error.FFmpegError, ValueError) as error:
        raise CodecError(f"{decoder} decoder failed: {error}") from error
    if len(frames) != 1:
        raise CodecError(f"{decoder} stream decodes to {len(frames)} frames, not one")
    (frame,) = frames
    depth = next((bits for bits, name in PIX_FMT.items() if frame.format.name == name), None)
    if depth is None:
        raise CodecError(f"{decoder} stream has the pixel format {frame.format.name}")
    plane = frame.planes[0]
    kind = np.dtype("<u2" if depth > 8 else "u1")
    samples = np.frombuffer(plane, kind).reshape(-1, plane.line_size // kind.itemsize)
    return samples[: frame.height, : frame.width], depth
