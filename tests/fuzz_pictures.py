"""Damaged payloads of all codecs of pictures: a result or a CodecError, soon and within memory.

    python tests/fuzz_pictures.py --seconds 300 --seed 1 [--codec h264] [--corpus findings]

Payloads of real encoders are changed with knowledge of their structure: units are swapped,
duplicated, taken from other payloads, streams joined, size fields changed; and blindly. They are
decoded in a child process, so that a library that crashes or hangs is a finding and not the end.
Inputs that are findings are saved with the codec's name. A payload is judged as one of a tile of
`TILE`; `--replay FILE` decodes one saved input in this process.
"""

import argparse
import hashlib
import pickle
import random
import re
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from torchcodec_weights import CodecError
from torchcodec_weights.codecs.pictures import SampleCodec
from torchcodec_weights.codecs.records import EncoderSettings
from torchcodec_weights.codecs.registry import get_codec

CODECS = ("vvc", "hevc", "h264", "av1", "vp9", "jpeg", "jpeg2000", "htj2k", "jpegxl")
TILE = (64, 256)
MOST_MEGABYTES = 64.0  # beyond what the process had before the payload
MOST_SECONDS = 3.0
_HANGS = 30.0
_BATCH = 1000

Parts = list[bytes]


def sampled(name: str) -> SampleCodec:
    codec = get_codec(name)
    assert isinstance(codec, SampleCodec)
    return codec


def encoded(name: str) -> list[bytes]:
    """Payloads of one codec: first those of a tile of `TILE`, last one of a larger tile."""
    codec, found = get_codec(name), []
    choices = [
        EncoderSettings(preset, bit_depth=depth)
        for depth in codec.bit_depths or (None,)
        for preset in codec.presets[:2] or (None,)
    ]
    cases = [(TILE, step, settings) for step in (0.3, 1.5) for settings in choices]
    for shape, step, settings in [*cases, ((512, 1024), 1.5, choices[0])]:
        tile = np.random.default_rng(len(found)).standard_normal(shape, np.float32)
        found.append(codec.encode(tile, step, 5.0, b"", settings).payload)
    return found


def nal_units(stream: bytes) -> Parts:
    return re.split(rb"(?<=[^\x00])(?=\x00{2,3}\x01)", stream)


def obus(stream: bytes) -> Parts:
    """AV1's units, headers and sizes included."""
    parts, position = [], 0
    while position < len(stream):
        start = position
        position += 1
        size = shift = 0
        while True:
            byte = stream[position]
            position += 1
            size |= (byte & 127) << shift
            shift += 7
            if not byte & 128:
                break
        position += size
        parts.append(stream[start:position])
    return parts


def segments(stream: bytes) -> Parts:
    """Segments of JPEG and JPEG 2000, the last with all data that follow."""
    parts, position = [stream[:2]], 2
    while position + 4 <= len(stream):
        end = position + 2 + int.from_bytes(stream[position + 2 : position + 4], "big")
        if stream[position + 1] in (0xDA, 0x90):  # SOS, SOT
            break
        parts.append(stream[position:end])
        position = end
    parts += [stream[position : position + 14], stream[position + 14 :]]
    return parts


def pieces(stream: bytes) -> Parts:
    """Headers and data of what has no units."""
    return [stream[:4], stream[4:12], stream[12:20], stream[20:]]


SPLIT: dict[str, Callable[[bytes], Parts]] = {
    "vvc": nal_units,
    "hevc": nal_units,
    "h264": nal_units,
    "av1": obus,
    "vp9": pieces,
    "jpeg": segments,
    "jpeg2000": segments,
    "htj2k": segments,
    "jpegxl": pieces,
}
MARKERS = (
    *(bytes([0xFF, code]) for code in (0xD0, 0xD7, 0x01, 0xD8, 0xD9, 0xFF, 0x93, 0x4F)),
    b"\xff\xfe\0\2",
    b"\xff\xdd\0\4\0\1",
    b"\xff\xdc\0\4\xff\xff",
    b"\xff\xc2\0\x0b\x08\x40\0\x40\0\1\1\x11\0",
    b"\xff\xc0\0\x0b\x08\x40\0\x40\0\1\1\x11\0",
    b"\xff\x64\0\4\0\1",
    b"\0\0\1",
    b"\0\0\0\1",
    b"\0\0\3",
)


def flipped(data: bytes, rng: random.Random, first: int, end: int, times: int) -> bytes:
    """Bits of some bytes changed."""
    changed = bytearray(data)
    end = min(end, len(changed))
    for _ in range(times if end > first else 0):
        changed[rng.randrange(first, end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def changed(name: str, seeds: list[bytes], rng: random.Random) -> bytes:
    """One payload, changed in one to four ways."""
    stream = rng.choice(seeds[:-1])
    for _ in range(rng.randint(1, 4)):
        stream = _change(name, stream, seeds, rng)
    return stream


def _change(name: str, stream: bytes, seeds: list[bytes], rng: random.Random) -> bytes:
    way = rng.randrange(12)
    if not stream:
        return rng.choice(seeds)
    if way < 6:
        try:
            parts = SPLIT[name](stream)
        except IndexError:  # damaged before
            parts = pieces(stream)
        other = SPLIT[name](rng.choice(seeds))
        at = rng.randrange(len(parts))
        if way == 0:
            parts.insert(at, rng.choice(other))
        elif way == 1:
            parts[at] = rng.choice(other)
        elif way == 2:
            parts[at:at] = [parts[at]] * rng.choice((1, 2, 40))
        elif way == 3:
            del parts[at]
        elif way == 4:
            there = rng.randrange(len(parts))
            parts[at], parts[there] = parts[there], parts[at]
        else:
            # Sizes and types lie in the first bytes of a unit.
            parts[at] = flipped(parts[at], rng, 0, 24, rng.randint(1, 4))
        return b"".join(parts)
    at = rng.randrange(len(stream) + 1)
    if way == 6:
        return stream + rng.choice(seeds)
    if way == 7:
        return stream[:at]
    if way == 8:
        return stream[:at] + rng.choice(MARKERS) + stream[at:]
    if way == 9:
        return flipped(stream, rng, 0, 80, rng.randint(1, 6))
    if way == 10:
        end = at + rng.choice((1, 2, 4, 30))
        return stream[:at] + rng.choice((b"\0", b"\xff")) * (end - at) + stream[end:]
    return flipped(stream, rng, 0, len(stream), rng.choice((1, 3, 20)))


def decode(name: str, payload: bytes) -> bool:
    """Whether a payload is decoded; False if it is refused.

    Raises:
        AssertionError: a weight is not finite.
    """
    out = np.empty(TILE, np.float32)
    try:
        sampled(name).decode(payload, 1.0, b"", TILE, out)
    except CodecError:
        return False
    assert np.isfinite(out).all()
    return True


def _peak() -> float:
    """The most memory of this process, in MB, since `_forget_peak`."""
    if sys.platform == "linux":
        found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found
        return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _forget_peak() -> None:
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def child(seeds_file: Path) -> None:
    """Decode what the lines of the input name; answer what came of each."""
    seeds: dict[str, list[bytes]] = pickle.loads(seeds_file.read_bytes())
    for name, payloads in seeds.items():
        for payload in payloads[:-1]:
            assert decode(name, payload), name
    print("ready", flush=True)
    for line in sys.stdin:
        name, number = line.split()
        payload = changed(name, seeds[name], random.Random(f"{name} {number}"))
        _forget_peak()
        before, begin = _peak(), time.perf_counter()
        try:
            outcome = "decoded" if decode(name, payload) else "refused"
        except BaseException as error:
            outcome = f"raised {type(error).__name__}: {error}".replace("\n", " ")
        seconds, megabytes = time.perf_counter() - begin, _peak() - before
        print(f"{seconds:.3f} {megabytes:.1f} {outcome}", flush=True)


class Answer(NamedTuple):
    """What a child said of an input."""

    seconds: float
    megabytes: float
    outcome: str

    def finding(self) -> str | None:
        """What is wrong with it, None if nothing is."""
        if self.outcome not in ("decoded", "refused"):
            return self.outcome
        if self.seconds > MOST_SECONDS:
            return f"took {self.seconds:.1f} s"
        if self.megabytes > MOST_MEGABYTES:
            return f"took {self.megabytes:.0f} MB"
        return None


class Child:
    """A process that decodes."""

    def __init__(self, seeds_file: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", str(seeds_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        ready = self._line()
        if ready != "ready":
            raise RuntimeError(f"the child does not start: {ready}")

    def ask(self, name: str, number: str) -> Answer:
        """What comes of an input."""
        assert self._process.stdin
        try:
            self._process.stdin.write(f"{name} {number}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return Answer(0, 0, self._ended())
        line = self._line()
        if not re.match(r"[\d.]+ -?[\d.]+ ", line):
            return Answer(0, 0, line)
        seconds, megabytes, outcome = line.split(" ", 2)
        return Answer(float(seconds), float(megabytes), outcome)

    def _line(self) -> str:
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], 4 * _HANGS)[0]:
            return "hung"
        return self._process.stdout.readline().strip() or self._ended()

    def _ended(self) -> str:
        return f"ended the process with status {self._process.wait()}"

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def inputs(codecs: list[str], seed: int) -> Iterator[tuple[str, str]]:
    """Codec and number of each input, without end."""
    number = 0
    while True:
        for name in codecs:
            yield name, f"{seed}.{number}"
        number += 1


def fuzz(codecs: list[str], seconds: float, seed: int, corpus: Path) -> int:
    """Run, print one line, and return the number of findings."""
    seeds = {name: encoded(name) for name in codecs}
    outcomes = dict.fromkeys(("decoded", "refused"), 0)
    findings = tried = 0
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        seeds_file = Path(folder) / "seeds"
        seeds_file.write_bytes(pickle.dumps(seeds))
        worker: Child | None = None
        for name, number in inputs(codecs, seed):
            if time.monotonic() - begin > seconds:
                break
            worker = worker or Child(seeds_file)
            answer = worker.ask(name, number)
            tried += 1
            if answer.outcome in outcomes:
                outcomes[answer.outcome] += 1
            finding = answer.finding()
            if finding is not None:
                findings += 1
                payload = changed(name, seeds[name], random.Random(f"{name} {number}"))
                corpus.mkdir(parents=True, exist_ok=True)
                digest = hashlib.sha256(payload).hexdigest()[:12]
                path = corpus / f"{name}-{digest}"
                path.write_bytes(payload)
                print(f"{path}: {finding}", file=sys.stderr)
            if answer.outcome not in outcomes or tried % (_BATCH * len(codecs)) == 0:
                worker.end()
                worker = None
        if worker is not None:
            worker.end()
    spent = time.monotonic() - begin
    print(
        f"{tried} inputs tried, {outcomes['refused']} refused, {outcomes['decoded']} decoded, "
        f"{findings} findings, {spent:.0f} seconds"
    )
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description="Damaged payloads of all codecs of pictures.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codec", choices=CODECS, action="append")
    parser.add_argument("--corpus", type=Path, default=Path("findings"))
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return 0
    if options.replay:
        name = options.replay.name.partition("-")[0]
        print("decoded" if decode(name, options.replay.read_bytes()) else "refused")
        return 0
    codecs = options.codec or list(CODECS)
    return 1 if fuzz(codecs, options.seconds, options.seed, options.corpus) else 0


if __name__ == "__main__":
    sys.exit(main())
