"""Decoders in worker processes: the same samples, and errors instead of crashes."""

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IMAGE, VIDEO, coded

from torchcodec_weights import CodecError
from torchcodec_weights.codecs.isolation import isolated_decoders
from torchcodec_weights.codecs.pictures import SampleCodec
from torchcodec_weights.codecs.records import EncoderSettings
from torchcodec_weights.codecs.registry import get_codec

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers need Linux")

SHAPE = (64, 256)


def sampled(name: str) -> SampleCodec:
    codec = get_codec(name)
    assert isinstance(codec, SampleCodec)
    return codec


def payload_of(name: str, shape: tuple[int, int] = SHAPE) -> bytes:
    tile = np.random.default_rng(0).standard_normal(shape, np.float32)
    settings = EncoderSettings(next(iter(get_codec(name).presets), None))
    return get_codec(name).encode(tile, 0.5, 6.0, b"", settings).payload


def decode(name: str, payload: bytes, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    out = np.empty(shape, np.float32)
    sampled(name).decode(payload, 1.0, b"", shape, out)
    return out


def children() -> list[int]:
    """Worker processes of this one, in any state."""
    found = []
    for task in os.listdir("/proc/self/task"):  # noqa: PTH208
        try:
            with open(f"/proc/self/task/{task}/children") as file:  # noqa: PTH123
                found += [int(pid) for pid in file.read().split()]
        except FileNotFoundError:  # the thread has ended
            continue
    return [pid for pid in found if b"isolated_worker" in command(pid)]


def command(pid: int) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123
        return file.read()


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    yield
    assert SampleCodec.frame_decoder is None
    assert not children()


@pytest.mark.parametrize("name", [*VIDEO, *IMAGE])
def test_the_same_samples_from_another_process(name: str) -> None:
    payload = payload_of(name)
    expected = decode(name, payload)
    with isolated_decoders():
        assert (decode(name, payload) == expected).all()
        assert len(children()) == 1
        with pytest.raises(CodecError):
            decode(name, payload[:20])
        assert (decode(name, payload) == expected).all()
        assert len(children()) == 1
    assert not children()
    assert (decode(name, payload) == expected).all()


def test_workers_know_no_pytorch() -> None:
    payload = payload_of("h264")
    with isolated_decoders():
        decode("h264", payload)
        (worker,) = children()
        with open(f"/proc/{worker}/maps") as file:  # noqa: PTH123
            assert "libtorch" not in file.read()


def test_workers_inherit_nothing() -> None:
    payload = payload_of("h264")
    with open(os.devnull) as file, isolated_decoders():  # noqa: PTH123
        os.set_inheritable(file.fileno(), True)
        decode("h264", payload)
        (worker,) = children()
        opened = os.listdir(f"/proc/{worker}/fd")  # noqa: PTH208
        # Its two pipes, the answers' copy, and where it may complain.
        assert sorted(map(int, opened)) == [0, 1, 2, 3]


def test_whole_weights_by_several_threads(query: torch.Tensor) -> None:
    tensor = coded(query, "h264", tile_shape=(50, 384))
    expected = tensor.dequantize()
    with isolated_decoders():
        for _ in range(3):
            assert torch.equal(tensor.dequantize(), expected)
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(lambda _: tensor.dequantize(), range(12)):
                assert torch.equal(found, expected)
        assert 1 <= len(children()) <= 4 * torch.get_num_threads()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_is_an_error_and_is_replaced(number: signal.Signals) -> None:
    payload = payload_of("hevc")
    expected = decode("hevc", payload)
    with isolated_decoders():
        decode("hevc", payload)
        (worker,) = children()
        os.kill(worker, number)
        with pytest.raises(CodecError, match=f"hevc worker process ended by signal {number.name}"):
            decode("hevc", payload)
        assert (decode("hevc", payload) == expected).all()
        assert children() != [worker]


def test_a_worker_that_dies_while_it_decodes() -> None:
    shape = (4096, 1024)
    payload = payload_of("hevc", shape)
    with isolated_decoders():
        decode("hevc", payload, shape)
        (worker,) = children()

        def kill() -> None:
            time.sleep(0.03)  # of some 500 ms
            os.kill(worker, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        with pytest.raises(CodecError, match="ended by signal SIGKILL"):
            decode("hevc", payload, shape)
        thread.join()


def test_too_little_memory_is_an_error_that_says_so() -> None:
    shape = (4096, 1024)
    payload = payload_of("h264", shape)
    for max_bytes in (2**18, 2**20, 2**23):
        with (
            isolated_decoders(max_bytes),
            pytest.raises(CodecError, match=r"h264 decoder failed .*: it ran out of memory"),
        ):
            decode("h264", payload, shape)
    with isolated_decoders(max_bytes=2**28):
        decode("h264", payload, shape)


def test_too_little_time_is_an_error_that_says_so() -> None:
    shape = (4096, 1024)
    payload = payload_of("hevc", shape)
    with isolated_decoders(seconds=0.02):
        begin = time.monotonic()
        with pytest.raises(CodecError, match=r"hevc worker process took more than 0\.02 s"):
            decode("hevc", payload, shape)
        assert time.monotonic() - begin < 5
    with isolated_decoders(seconds=30):
        decode("hevc", payload, shape)


_CRASHING = """
import ctypes
import numpy as np
from torchcodec_weights.codecs.video.x26x import H264

class Crashing(H264):
    def decode_frame(self, payload):
        print("what a library prints is no answer", flush=True)
        ctypes.string_at(0)

class Larger(H264):
    def decode_frame(self, payload):
        return np.zeros((4096, 4096), np.uint8), 8

class Failing(H264):
    def decode_frame(self, payload):
        raise RuntimeError("no codec should raise this")
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Crashing", "h264 worker process ended by signal SIGSEGV"),
        ("Larger", "announces a frame of 256x64 samples and decodes to 4096x4096"),
        ("Failing", r"h264 decoder failed in its worker process: RuntimeError\('no codec"),
    ],
)
def test_a_codec_of_others_that_misbehaves(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crashing.py").write_text(_CRASHING)
    monkeypatch.syspath_prepend(tmp_path)
    codec = getattr(importlib.import_module("crashing"), name)()
    payload, out = payload_of("h264"), np.empty(SHAPE, np.float32)
    with isolated_decoders():
        for _ in range(2):
            with pytest.raises(CodecError, match=message):
                codec.decode(payload, 1.0, b"", SHAPE, out)
        assert not children()
        decode("h264", payload)


def test_a_forked_process_has_workers_of_its_own() -> None:
    payload = payload_of("h264")
    expected = decode("h264", payload)
    with isolated_decoders():
        decode("h264", payload)
        pid = os.fork()
        if pid == 0:
            try:
                same = bool((decode("h264", payload) == expected).all()) and len(children()) == 1
            except BaseException:
                same = False
            os._exit(0 if same else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert (decode("h264", payload) == expected).all()


def test_workers_end_with_their_process() -> None:
    program = """
import os, sys
import test_isolation
from torchcodec_weights.codecs.isolation import isolated_decoders
isolated_decoders()
test_isolation.decode("h264", test_isolation.payload_of("h264"))
print(*test_isolation.children(), flush=True)
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.path.dirname(__file__)},  # noqa: PTH120
    )
    (worker,) = map(int, done.stdout.split())
    for _ in range(100):
        try:
            if b"isolated_worker" not in command(worker):
                return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    raise AssertionError("the worker lives on")


def test_settings_nest_and_are_undone() -> None:
    payload = payload_of("h264")
    with isolated_decoders():
        outer = SampleCodec.frame_decoder
        with isolated_decoders(seconds=5):
            assert SampleCodec.frame_decoder is not outer
            decode("h264", payload)
        assert SampleCodec.frame_decoder is outer
        decode("h264", payload)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_bytes": 0}, "max_bytes=0: allowed: 1 or more"),
        ({"seconds": 0.0}, r"seconds=0\.0: allowed: more than 0"),
        ({"seconds": float("inf")}, "seconds=inf: allowed"),
    ],
)
def test_limits_that_are_none(limits: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        isolated_decoders(**limits)  # type: ignore[arg-type]
