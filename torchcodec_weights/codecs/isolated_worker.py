"""The program of a worker process: decodes payloads of one codec from its input to its output.

It is run as a file and creates the package's module without running its `__init__`, which would
import PyTorch. See `isolation.py` for the other end.
"""

import errno
import importlib
import json
import os
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

REQUEST = struct.Struct("<QQd")
"""Bytes of the payload that follows, samples of its frame, and seconds that it may take."""

ANSWER = struct.Struct("<BBcII")
"""Status, depth in bits, type of the samples, height and width; the samples follow in row-major
order. Where there is no frame the last is the length of a message that follows."""

FRAME, REFUSED, FAILED = range(3)
"""A frame; a `CodecError`, after which the worker goes on; another failure, after which it ends."""

DTYPES = {b"B": "u1", b"H": "<u2", b"f": "<f4"}
"""NumPy's types by the character of an answer."""

_ROOT = Path(__file__).parent.parent


def main() -> None:
    """Serve until the input ends."""
    task = json.loads(sys.argv[1])
    # Libraries may print to descriptor 1, so answers go to another one.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests = sys.stdin.buffer
    try:
        codec = _codec(task)
        _limit_memory(task["max_bytes"])
    except BaseException as error:
        _say(answers, FAILED, f"it cannot be loaded: {error!r}")
        raise
    _say(answers, FRAME, "")
    while len(header := requests.read(REQUEST.size)) == REQUEST.size:
        size, samples, seconds = REQUEST.unpack(header)
        _serve(codec, requests, size, samples, seconds, answers)


def _codec(task: dict[str, Any]) -> Any:
    sys.path[:] = task["path"]
    package = ModuleType(_ROOT.name)
    package.__path__ = [str(_ROOT)]
    sys.modules[_ROOT.name] = package
    kind: Any = importlib.import_module(task["module"])
    for part in task["name"].split("."):
        kind = getattr(kind, part)
    codec = kind()
    codec.info()  # imports the libraries
    return codec


def _limit_memory(max_bytes: int) -> None:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + max_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))


def _memory_left() -> int:
    """The least address space that was left at any time, in bytes."""
    import resource

    status = Path("/proc/self/status").read_text().split()
    peak = 1024 * int(status[status.index("VmPeak:") + 1])
    return resource.getrlimit(resource.RLIMIT_AS)[0] - peak


def _limit_time(seconds: float) -> None:
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    most = int(usage.ru_utime + usage.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))


def _serve(
    codec: Any, requests: BinaryIO, size: int, samples: int, seconds: float, answers: BinaryIO
) -> None:
    """Read one payload of `size` bytes, decode it and answer.

    Raises:
        SystemExit: the worker cannot go on, after an answer `FAILED`.
    """
    import numpy as np

    from torchcodec_weights.errors import CodecError

    try:
        _limit_time(seconds)
        frame, depth = codec.decode_frame(requests.read(size))
        frame = np.ascontiguousarray(frame)
        kind = frame.dtype.char.encode()
        if frame.ndim != 2 or kind not in DTYPES:
            raise CodecError(f"{codec.name} stream decodes to {frame.dtype} {frame.shape}")
        answers.write(ANSWER.pack(FRAME, depth, kind, *frame.shape))
        answers.write(frame.data)
        answers.flush()
    except MemoryError:
        _fail(answers, "it ran out of memory")
    except CodecError as error:
        # FFmpeg's decoders report some failures to allocate a frame as invalid data.
        if getattr(error.__cause__, "errno", None) == errno.ENOMEM or _memory_left() < 4 * samples:
            _fail(answers, f"it ran out of memory ({error})")
        _say(answers, REFUSED, str(error))
    except Exception as error:
        _fail(answers, repr(error))


def _fail(answers: BinaryIO, message: str) -> None:
    _say(answers, FAILED, message)
    raise SystemExit(1)


def _say(answers: BinaryIO, status: int, message: str) -> None:
    said = message.encode()[:1000]
    answers.write(ANSWER.pack(status, 0, b"B", 0, len(said)) + said)
    answers.flush()


if __name__ == "__main__":
    main()
