"""Decoders of pictures in processes of their own, with limits on memory and time.

The libraries behind the codecs of pictures are large programs in C that parse bytes from files. For
files from strangers, a service may run them in worker processes, so that a crash or an endless loop
ends only a worker. A worker (`isolated_worker.py`) is a new interpreter that imports the codec,
without PyTorch, and decodes one payload after the other.

A worker's answers are not trusted either: a frame is accepted only in the size that the payload's
header announces, which was checked.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs import isolated_worker
from torchcodec_weights.codecs.pictures import SampleCodec
from torchcodec_weights.errors import CodecError
from torchcodec_weights.system.setting import Setting

_STARTING_SECONDS = 60.0  # imports, on a machine that is busy
_LONGEST_MESSAGE = 2**16


def isolated_decoders(max_bytes: int = 2**30, seconds: float = 30.0) -> Setting:
    """Decode pictures on the CPU in worker processes from now on.

    A codec has as many workers as threads that decode it at the same time. Workers start when they
    are needed, and end with the setting or with this process. A worker that exceeds a limit or
    crashes is replaced, and its payload raises `CodecError`. Other codecs than those of pictures
    are decoded in this process. The setting applies to the whole process.

    Args:
        max_bytes: address space that a worker may use for decoding, beyond what it uses when it has
            started.
        seconds: limit for one payload, of both wall-clock time and processor time.

    Returns:
        A context manager that restores the former setting at its end.

    Raises:
        ValueError: a limit is not positive.
        NotImplementedError: the system is not Linux.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes}: allowed: 1 or more")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds={seconds}: allowed: more than 0")
    if sys.platform != "linux":
        raise NotImplementedError(f"isolated_decoders on {sys.platform}: allowed: Linux")
    former = SampleCodec.frame_decoder
    workers = _Workers(max_bytes, seconds)
    SampleCodec.frame_decoder = workers

    def undo() -> None:
        SampleCodec.frame_decoder = former
        workers.close()

    return Setting(undo)


class _WorkerError(CodecError):
    """A worker failed and must be replaced."""


class _Worker:
    """A process that decodes payloads of one codec.

    Raises:
        CodecError: it does not start.
    """

    def __init__(self, codec: SampleCodec, max_bytes: int) -> None:
        kind = type(codec)
        task = {"module": kind.__module__, "name": kind.__qualname__, "path": sys.path}
        # One thread each, as decoders have; more would only reserve address space.
        threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")
        self._name = codec.name
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                str(Path(isolated_worker.__file__)),
                json.dumps(task | {"max_bytes": max_bytes}),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=os.environ | threads,
            start_new_session=True,  # an interrupt from the keyboard is for the parent
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._input, False)
        os.set_blocking(self._output, False)
        try:
            self._answer(time.monotonic() + _STARTING_SECONDS, _STARTING_SECONDS)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def decode(
        self, payload: bytes, size: tuple[int, int], seconds: float
    ) -> tuple[NDArray[Any], int]:
        """Decode a payload to a frame of `size` (height, width), and its depth.

        Raises:
            _WorkerError: the worker crashed, exceeded a limit, or sent a malformed answer.
            CodecError: the payload cannot be decoded.
        """
        deadline = time.monotonic() + seconds
        request = isolated_worker.REQUEST.pack(len(payload), size[0] * size[1], seconds)
        self._write(request + payload, deadline, seconds)
        depth, kind, height, width = self._answer(deadline, seconds)
        dtype = isolated_worker.DTYPES.get(kind)
        if dtype is None or (height, width) != size:
            raise _WorkerError(
                f"{self._name} stream announces a frame of {size[1]}x{size[0]} samples and decodes "
                f"to {width}x{height}"
            )
        frame = np.empty(size, dtype)
        self._fill(frame.data.cast("B"), deadline, seconds)
        return frame, depth

    def _answer(self, deadline: float, seconds: float) -> tuple[int, bytes, int, int]:
        """Depth, type, height and width of a frame that follows, or none if the worker is ready."""
        header = self._read(isolated_worker.ANSWER.size, deadline, seconds)
        status, depth, kind, height, width = isolated_worker.ANSWER.unpack(header)
        if status == isolated_worker.FRAME:
            return depth, kind, height, width
        said = self._read(min(width, _LONGEST_MESSAGE), deadline, seconds)
        message = said.decode(errors="replace")
        if status == isolated_worker.REFUSED:
            raise CodecError(message)
        raise _WorkerError(f"{self._name} decoder failed in its worker process: {message}")

    def _read(self, count: int, deadline: float, seconds: float) -> bytearray:
        data = bytearray(count)
        self._fill(memoryview(data), deadline, seconds)
        return data

    def _fill(self, buffer: memoryview, deadline: float, seconds: float) -> None:
        while buffer:
            self._wait(self._output, select.POLLIN, deadline, seconds)
            try:
                read = os.readv(self._output, [buffer])
            except BlockingIOError:
                continue
            if not read:
                raise _WorkerError(self._end())
            buffer = buffer[read:]

    def _write(self, data: bytes, deadline: float, seconds: float) -> None:
        rest = memoryview(data)
        while rest:
            self._wait(self._input, select.POLLOUT, deadline, seconds)
            try:
                rest = rest[os.write(self._input, rest) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                return  # the worker may have said why, and has ended if not

    def _wait(self, descriptor: int, event: int, deadline: float, seconds: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise _WorkerError(f"{self._name} worker process took more than {seconds:g} s")

    def _end(self) -> str:
        """How the process ended, after its pipe was closed."""
        try:
            status = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return f"{self._name} worker process closed its pipe"
        if status == -signal.SIGXCPU:
            return f"{self._name} worker process took too much time of the processor"
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"{self._name} worker process ended by {how}"

    def kill(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._close()

    def abandon(self) -> None:
        """Leave the process to the parent of this one."""
        self._process.returncode = 0  # not ours to wait for
        self._close()

    def _close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


class _Workers:
    """Workers that are kept for the next payload of their codec.

    Args:
        max_bytes, seconds: as in `isolated_decoders`.
    """

    def __init__(self, max_bytes: int, seconds: float) -> None:
        self._max_bytes, self._seconds = max_bytes, seconds
        self._lock = threading.Lock()
        self._idle: dict[type[SampleCodec], list[_Worker]] = {}
        self._all: set[_Worker] = set()
        self._closed = False
        _pools.append(self)

    def begin_anew(self) -> None:
        """Forget all workers: in a forked process, they and the lock's holder are the parent's."""
        for worker in self._all:
            worker.abandon()
        self._lock = threading.Lock()
        self._idle, self._all = {}, set()

    def __call__(
        self, codec: SampleCodec, payload: bytes, size: tuple[int, int]
    ) -> tuple[NDArray[Any], int]:
        worker = self._take(codec)
        try:
            frame = worker.decode(payload, size, self._seconds)
        except _WorkerError:
            self._end(worker)
            raise
        except CodecError:
            self._give_back(codec, worker)
            raise
        except BaseException:  # an answer may be under way
            self._end(worker)
            raise
        self._give_back(codec, worker)
        return frame

    def _take(self, codec: SampleCodec) -> _Worker:
        with self._lock:
            idle = self._idle.get(type(codec))
            if idle:
                return idle.pop()
        worker = _Worker(codec, self._max_bytes)
        with self._lock:
            self._all.add(worker)
        return worker

    def _give_back(self, codec: SampleCodec, worker: _Worker) -> None:
        with self._lock:
            if not self._closed:
                self._idle.setdefault(type(codec), []).append(worker)
                return
        self._end(worker)

    def _end(self, worker: _Worker) -> None:
        with self._lock:
            self._all.discard(worker)
        worker.kill()

    def close(self) -> None:
        """End all workers; those that are decoding end after their payload."""
        with self._lock:
            self._closed = True
            idle = [worker for workers in self._idle.values() for worker in workers]
            self._idle.clear()
        for worker in idle:
            self._end(worker)
        if self in _pools:
            _pools.remove(self)


_pools: list[_Workers] = []


def _begin_anew() -> None:
    for workers in _pools:
        workers.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
