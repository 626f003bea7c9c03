"""Structured fuzzing: files whose fields lie under checksums that are right.

    python tests/fuzz.py matrix --seconds 1800
    python tests/fuzz.py matrix --seconds 1800 --sanitize
    python tests/fuzz.py metadata --seconds 1800

`matrix` changes what a weight is stored as, field by field (container, tile table, private data,
streams, outliers, scales, shapes), computes all checksums anew, and opens and uses the result in
every way. `metadata` changes what a safetensors file or a pickle says beside the arrays. With
`--sanitize`, the compiled codecs run under AddressSanitizer and UndefinedBehaviorSanitizer.

The work is done in a process of its own, which says before each input what it is: a crash, an
exception that is no CodecError, rows that differ between two ways to decode, too much memory
(64 MB and four times what is stored or decoded) or too much time is a finding. Its input is saved,
and the exit status is 1. `--replay FILE` uses a saved input again.

tests/corpus/ has a file for each way in which one was refused, found by `--collect tests/corpus`;
tests/test_fuzz.py uses them all.
"""

import argparse
import copy
import io
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hostile import Parts, parts_of, stored, weight_of
from safetensors import SafetensorError

from torchcodec_weights import (
    CodecError,
    CodecTensor,
    codec_weight_only,
    load_file,
)
from torchcodec_weights.codecs.common import compiled
from torchcodec_weights.matrix.importance import Importance

HERE = Path(__file__).parent
FINDINGS = HERE.parent / "fuzz_findings"
FOUND = 3  # exit status of the process that tries inputs
BATCH_SECONDS = 60.0
INPUT_SECONDS = 20.0
MEMORY = 64 * 2**20

Rng = random.Random
NUMBERS = (0, 1, 2, 3, 7, 31, 32, 33, 127, 128, 255, 256, 4095, 4096, 65535, 65536, 2**20)
LARGE = (2**24, 2**31 - 1, 2**31, 2**32 - 1)
FLOATS = (0.0, -0.0, 1e-45, 1e30, -1.0, float("inf"), float("-inf"), float("nan"))


def bases() -> list[Parts]:
    """Weights of every way to decode, small, with outliers and zero points."""
    rng = torch.Generator().manual_seed(0)
    plain = torch.randn(70, 64, generator=rng)
    spiky = plain.clone()
    spiky[3, 5], spiky[60, 63] = 900.0, -700.0
    shifted = plain + torch.arange(70)[:, None]
    odd = torch.randn(33, 71, generator=rng)
    large = torch.randn(600, 256, generator=rng)
    ectcq, lossless = codec_weight_only(bits=5, preset="fast"), codec_weight_only("lossless")
    made = [
        *((weight, ectcq) for weight in (spiky, shifted, odd.bfloat16(), large.half())),
        (spiky, codec_weight_only(bits=6, preset="fast", tile_shape=(32, 32))),
        *((weight, lossless) for weight in (spiky, odd.bfloat16(), odd.half(), large.bfloat16())),
        *((spiky, codec_weight_only(codec, bits=7)) for codec in ("h264", "jpeg2000")),
    ]
    coded = [CodecTensor.from_hp(weight, config) for weight, config in made]
    coded.append(coded[3][100:200].contiguous())  # a slice: tiles are left out
    columns = torch.rand(256, generator=rng).numpy()
    for config in (ectcq, codec_weight_only("h264", bits=5)):  # by columns, and sorted
        importance = Importance(torch.rand(600, generator=rng).numpy(), np.diag(columns))
        coded.append(CodecTensor.from_hp(large, config.with_importance(importance, 5.0)))
    return [parts_of(weight) for weight in coded]


# What is changed. Each function changes one thing in place.


def number(rng: Rng, old: int, limit: int = 2**32) -> int:
    choice = rng.randrange(6)
    if choice == 0:
        return rng.choice(NUMBERS) % limit
    if choice == 1:
        return rng.choice(LARGE) % limit
    if choice == 2:
        return rng.randrange(limit)
    return max(0, old + rng.choice((-2, -1, 1, 2, old, -(old // 2), 32, -32))) % limit


def spoil(rng: Rng, data: bytes) -> bytes:
    """Bytes changed here and there, cut off, extended, or repeated."""
    out = bytearray(data)
    kind = rng.randrange(7)
    if kind == 0:
        return bytes(out[: rng.randrange(len(out) + 1)])
    if kind == 1:
        return bytes(out) + rng.randbytes(rng.randrange(1, 70))
    if kind == 2 and len(out) >= 4:
        struct.pack_into("<I", out, rng.randrange(len(out) - 3), number(rng, 0))
    elif kind == 3 and len(out) >= 4:  # counts and sizes are in front
        start = 4 * rng.randrange(min(8, len(out) // 4))
        struct.pack_into("<I", out, start, number(rng, struct.unpack_from("<I", out, start)[0]))
    elif kind == 4 and len(out) > 1:
        a, b = sorted(rng.randrange(len(out)) for _ in range(2))
        out[a:b] = out[a:b] * rng.randrange(3)
    else:
        for _ in range(rng.choice((1, 1, 2, 8, 100))):
            if out:
                out[rng.randrange(len(out))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    return bytes(out)


def change_tile(rng: Rng, parts: Parts) -> None:
    if not parts.tiles:
        return
    index = rng.randrange(len(parts.tiles))
    payload, outliers, unit = parts.tiles[index]
    kind = rng.randrange(4)
    if kind == 0:
        outliers = change_outliers(rng, outliers, parts)
    elif kind == 1:
        unit = rng.choice((*FLOATS, unit * 2))
    else:
        payload = spoil(rng, payload)
    parts.tiles[index] = payload, outliers, unit


def change_outliers(rng: Rng, section: bytes, parts: Parts) -> bytes:
    if rng.random() < 0.3:
        return spoil(rng, section)
    words = [rng.choice((0, 1, 5, 0xFFFF, 0xFFFE, rng.randrange(2**16)))
             for _ in range(rng.choice((0, 1, 3, 40, 3000)))]  # fmt: skip
    width = 4 if parts.dtype == 0 else 2
    values = rng.randbytes(width * sum(word != 0xFFFF for word in words))
    count = len(words) if rng.random() < 0.8 else number(rng, len(words))
    return struct.pack("<I", count) + np.array(words, "<u2").tobytes() + values


def change_tiles(rng: Rng, parts: Parts) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        rng.shuffle(parts.tiles)
    elif kind == 1:
        del parts.tiles[rng.randrange(len(parts.tiles) + 1) :]
    elif kind == 2:
        parts.tiles *= rng.choice((2, 3, 40))
    elif kind == 3 and parts.tiles:
        parts.tiles[rng.randrange(len(parts.tiles))] = b"", b"", 0.0
    elif rng.random() < 0.5:
        parts.across = number(rng, parts.across)
    else:
        parts.order = number(rng, parts.order)


def change_sizes(rng: Rng, parts: Parts) -> None:
    """Rows and columns; scales of that size or not; a window of what was there or not."""
    if rng.random() < 0.5:
        parts.rows = number(rng, parts.rows)
    else:
        parts.cols = number(rng, parts.cols)
    if rng.random() < 0.7:
        parts.scale = np.resize(parts.scale, min(parts.rows, 2**20))
        parts.act_pre_scale = np.resize(parts.act_pre_scale, min(parts.cols, 2**20))
        if parts.zero_point is not None:
            parts.zero_point = np.resize(parts.zero_point, min(parts.rows, 2**20))
    if rng.random() < 0.5:
        parts.attributes["logical_shape"] = [parts.rows, parts.cols]


def change_header(rng: Rng, parts: Parts) -> None:
    names: tuple[str, ...] = (
        "version", "dtype", "name_size", "header_size", "private_size", "total_size",
    )  # fmt: skip
    names += ("rows", "cols", "tiles", "vectors_crc")
    limits = {"version": 2**16, "dtype": 2**8, "name_size": 2**8, "total_size": 2**64}
    name = rng.choice(names)
    parts.header[name] = number(rng, 1, limits.get(name, 2**32))


def change_identity(rng: Rng, parts: Parts) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        codecs = (b"ectcq", b"lossless", b"h264", b"jpeg2000", b"jpegxl", b"", b"\x1b[2J\xff")
        parts.codec = rng.choice(codecs)
    elif kind == 1:
        parts.dtype = rng.randrange(4)
    elif kind == 2:
        parts.version = rng.choice((0, 1, 2, 3, 4))
    elif kind == 3:
        parts.bases = rng.choice(FLOATS), rng.choice(FLOATS)
    else:
        parts.private = spoil(rng, parts.private)


def change_private(rng: Rng, parts: Parts) -> None:
    """Models and tables, field by field."""
    data = bytearray(parts.private)
    if not data:
        return
    if parts.codec == b"ectcq" and len(data) > 8 and rng.random() < 0.6:
        # Two frequencies change so that the sum stays right.
        evens = data[1]
        i, j = (3 + 2 * rng.randrange(max(1, min(evens, len(data) // 2 - 2))) for _ in range(2))
        a, b = (struct.unpack_from("<H", data, k)[0] for k in (i, j))
        move = rng.randrange(a + 1)
        if i != j and b + move < 2**16:
            struct.pack_into("<H", data, i, a - move)
            struct.pack_into("<H", data, j, b + move)
    else:
        data[rng.randrange(min(4, len(data)))] = rng.randrange(256)
    parts.private = bytes(data)


def change_vectors(rng: Rng, parts: Parts) -> None:
    name = rng.choice(("scale", "act_pre_scale", "zero_point"))
    old = getattr(parts, name)
    size = {"scale": parts.rows, "act_pre_scale": parts.cols, "zero_point": parts.rows}[name]
    size = min(size, 2**20)
    dtype = np.float32 if name == "zero_point" else np.uint8
    shapes = ((size,), (1,), (0,), (size, 0), (size, 1), (number(rng, size, 2**20),))
    new = np.resize(old if old is not None else np.zeros(1, dtype), rng.choice(shapes))
    if rng.random() < 0.2:
        new = new.astype(rng.choice((np.uint8, np.int8, np.float32, np.float64, np.int64, bool)))
    elif name == "zero_point" and new.size and new.dtype == np.float32:
        new.reshape(-1)[rng.randrange(new.size)] = rng.choice(FLOATS)
    setattr(parts, name, None if name == "zero_point" and rng.random() < 0.2 else new)


def change_attributes(rng: Rng, parts: Parts) -> None:
    shape, sizes = [parts.rows, parts.cols], [0, parts.rows, 0, parts.cols]
    for _ in range(rng.randrange(1, 3)):
        sizes[rng.randrange(4)] = number(rng, sizes[rng.randrange(4)])
    shapes: list[Any] = [shape[::-1], sizes[1::2], [2, *shape], [shape[0]], [], [-1, -1], None, "x"]
    name, value = rng.choice(
        (
            ("logical_shape", rng.choice(shapes)),
            ("window", rng.choice((sizes, sizes[:3], None, [0, 0, 0, 0], [0.5] * 4))),
            ("transposed", rng.choice((True, False, None, 1, "yes"))),
            ("logical_dtype", rng.choice((torch.float16, torch.float64, torch.int8, None, "a"))),
        )
    )
    parts.attributes[name] = value
    if name == "window" and rng.random() < 0.7:
        parts.attributes["logical_shape"] = sizes[1::2]


CHANGES = (
    change_tile,
    change_tile,
    change_tile,
    change_tiles,
    change_sizes,
    change_header,
    change_identity,
    change_private,
    change_vectors,
    change_attributes,
)


def changed_parts(rng: Rng, made: list[Parts]) -> Parts:
    parts = copy.deepcopy(rng.choice(made))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(CHANGES)(rng, parts)
    return parts


# How a weight is used, and what must hold where it is taken.


def use(weight: CodecTensor) -> None:
    """Every way to decode; raises AssertionError where two of them differ."""
    weight.check()
    dense = weight.dequantize(torch.float32)
    if weight.dim() != 2:
        return
    rows, cols = weight.shape
    if not weight.transposed:
        some = torch.tensor([0, rows - 1, rows // 2])
        exact = weight.to(torch.float32)
        assert _same(F.embedding(some, exact), dense[some]), "rows differ from the whole"
    part = weight[rows // 3 : rows // 3 + 1]
    assert _same(part.dequantize(torch.float32), dense[rows // 3 : rows // 3 + 1]), (
        "a slice differs"
    )
    for tokens in (1, 20):
        x = torch.ones(tokens, cols, dtype=weight.dtype)
        assert F.linear(x, weight).shape == (tokens, rows)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def use_parts(parts: Parts) -> None:
    use(weight_of(parts))


def allowance(parts: Parts) -> int:
    """Bytes of memory that a weight may take to be opened and used."""
    arrays = (parts.scale, parts.act_pre_scale, parts.zero_point)
    size = sum(len(payload) + len(outliers) for payload, outliers, _ in parts.tiles)
    size += sum(array.nbytes for array in arrays if array is not None) + len(parts.private)
    return MEMORY + 4 * max(size, 4 * max(2**24, 2**14 * size))


# Metadata


JSON_VALUES = (
    None,
    True,
    0,
    -1,
    2**70,
    1.5,
    "",
    "x",
    "\ud800",
    "\x1b[2J",
    [],
    {},
    [[]],
    {"_type": 1},
)


def change_json(rng: Rng, value: Any) -> Any:
    """JSON with something in it replaced, removed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        kind = rng.randrange(4)
        rest = {k: v for k, v in value.items() if k != key}
        if kind == 0:
            return rest
        if kind == 1:
            return {
                **rest,
                rng.choice(("a", "dequantize", "__class__", "\ud800", key + "x")): value[key],
            }
        return {**value, key: change_json(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        kind = rng.randrange(4)
        if kind == 0:
            return value[:index] + value[index + 1 :]
        if kind == 1:
            return [*value, value[index]]
        return [*value[:index], change_json(rng, value[index]), *value[index + 1 :]]
    if isinstance(value, int) and rng.random() < 0.5:
        return number(rng, abs(value))
    return rng.choice(JSON_VALUES)


def file_input(rng: Rng, made: list[Parts]) -> bytes:
    """A safetensors file of one weight whose metadata, names or header are not what they were."""
    weight = weight_of(rng.choice(made))
    with tempfile.TemporaryDirectory() as folder:
        path = stored(Path(folder) / "m.safetensors", weight)
        data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    for _ in range(rng.choice((1, 1, 2, 4))):
        metadata = header.get("__metadata__")
        if not isinstance(metadata, dict) or rng.random() < 0.15:
            header = change_json(rng, header)
            break
        key = rng.choice(list(metadata) or [""])
        text = metadata.get(key, "")
        kind = rng.randrange(10)
        if kind == 0:
            metadata.pop(key, None)
        elif kind == 1:
            metadata[key] = rng.choice(("[" * 5000 + "]" * 5000, "{", "", "NaN", "1e999", "\x00"))
        elif kind == 2:
            metadata["tied"] = json.dumps(change_json(rng, {"b": "layers.0.weight"}))
        else:
            try:
                metadata[key] = json.dumps(change_json(rng, json.loads(text)))
            except (ValueError, RecursionError):
                metadata[key] = str(rng.choice(JSON_VALUES))
    text = json.dumps(header).encode(errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


class _Pickled:
    """Pickles as a CodecTensor of another state."""

    def __init__(self, tensor: CodecTensor, state: dict[Any, Any]) -> None:
        self.tensor, self.state = tensor, state

    def __reduce_ex__(self, protocol: Any) -> Any:
        rebuild, (function, kind, args, state) = self.tensor.__reduce_ex__(2)
        return rebuild, (function, kind, args, {**state, **self.state})


def pickle_input(rng: Rng, made: list[Parts]) -> bytes:
    """A state dict of `torch.save` with a weight of another state."""
    tensor = weight_of(rng.choice(made))
    names: tuple[str, ...] = (
        "qdata", "scale", "act_pre_scale", "zero_point", "logical_shape", "logical_dtype",
    )  # fmt: skip
    names += ("window", "transposed", "dequantize", "empty_base", "_checked", "x")
    byte = torch.zeros(1, dtype=torch.uint8)
    values = (None, 1, "x", [1, 2], {}, torch.float64, byte, byte.expand(2**40), byte[:0],
              torch.zeros(3, 3), tensor.qdata[:60].clone(), tensor.qdata[::2], True)  # fmt: skip
    state = {rng.choice(names): rng.choice(values) for _ in range(rng.choice((1, 1, 2)))}
    file = io.BytesIO()
    torch.save({"w": _Pickled(tensor, state)}, file)
    return file.getvalue()


def use_bytes(data: bytes) -> None:
    """Load a file and use what it holds."""
    if data[:2] == b"PK":
        tensors = torch.load(io.BytesIO(data), weights_only=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.safetensors"
            path.write_bytes(data)
            tensors = load_file(path)
    for tensor in tensors.values():
        if isinstance(tensor, CodecTensor):
            use(tensor)


def metadata_input(rng: Rng, made: list[Parts]) -> bytes:
    return (pickle_input if rng.random() < 0.3 else file_input)(rng, made)


TARGETS: dict[str, tuple[Callable[..., Any], Callable[[Any], None], Callable[[Any], int]]] = {
    "matrix": (changed_parts, use_parts, allowance),
    "metadata": (metadata_input, use_bytes, lambda data: MEMORY + 4 * max(len(data), 2**26)),
}


# The two processes


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def memory(field: str) -> int:
    """Bytes that this process takes ("VmRSS"), or took at most ("VmHWM")."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    return 0


# What a file that lies may end in. Of torch.load's own errors there are these.
REFUSALS = (CodecError, SafetensorError, pickle.UnpicklingError)


def outcome(run: Callable[[Any], None], value: Any) -> str | None:
    """None where an input is used or refused as it should be, else what is wrong."""
    try:
        run(value)
    except REFUSALS as error:
        return f"refused: {type(error).__name__}"
    except Exception as error:
        return f"FINDING {type(error).__name__}: {str(error)[:200]}"
    return "used"


def child(target: str, seed: int, seconds: float, current: Path, library: str | None) -> int:
    """Try inputs for some time; the last line printed is what came of them."""
    if library:
        compiled.LIBRARY = Path(library)
    torch.set_num_threads(2)
    make, run, allowed = TARGETS[target]
    made, rng = bases(), Rng(seed)
    for parts in made:
        use_parts(parts)
    measured = library is None and os.access("/proc/self/clear_refs", os.W_OK)
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = make(rng, made)
        current.write_bytes(pickle.dumps(value))
        before = memory("VmRSS")
        if measured:
            reset_peak()
        start = time.monotonic()
        what = outcome(run, value)
        took = time.monotonic() - start
        if took > INPUT_SECONDS:
            what = f"FINDING {took:.0f} seconds"
        if measured and (peak := memory("VmHWM") - before) > allowed(value):
            what = f"FINDING {peak:,} bytes of memory, {allowed(value):,} allowed"
        if what is not None and what.startswith("FINDING"):
            print(what, flush=True)
            return FOUND
        counts[what or "used"] += 1
    print(json.dumps(counts), flush=True)
    return 0


def sanitized_library(folder: Path) -> tuple[str, dict[str, str]]:
    """The compiled codecs under the sanitizers, and the environment that they need."""
    from test_sanitizer import CODECS, build

    objects = [o for s in sorted(CODECS.glob("**/native/*.cpp")) if (o := build(s, folder))]
    library = str(folder / "libcodecs.so")
    sanitize = "-fsanitize=address,undefined"
    subprocess.run(["g++", "-shared", sanitize, "-pthread", *objects, "-o", library], check=True)
    # The runtime looks for what throws exceptions when it starts, so libstdc++ must be there.
    runtimes = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    options = "detect_leaks=0:allocator_may_return_null=1"
    return library, {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": options}


def fuzz(target: str, seconds: float, seed: int, sanitize: bool) -> int:
    counts: Counter[str] = Counter()
    findings = 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library, environment = sanitized_library(folder) if sanitize else (None, {})
        while (left := seconds - (time.monotonic() - start)) > 0:
            current = folder / "input"
            command = [sys.executable, __file__, target, "--child", str(current)]
            command += ["--seed", str(seed), "--seconds", str(min(left, BATCH_SECONDS))]
            command += ["--library", library] if library else []
            limit = BATCH_SECONDS + 10 * INPUT_SECONDS
            try:
                done = subprocess.run(
                    command, env={**os.environ, **environment}, capture_output=True, text=True,
                    timeout=limit,
                )  # fmt: skip
                status, output, errors = done.returncode, done.stdout, done.stderr
            except subprocess.TimeoutExpired:
                status, output, errors = -1, f"no end after {limit:.0f} seconds", ""
            last = output.strip().rpartition("\n")[2]
            if status == 0:
                counts.update(json.loads(last))
            else:
                findings += 1
                FINDINGS.mkdir(exist_ok=True)
                saved = FINDINGS / f"{target}-{seed}"
                if current.exists():
                    saved.write_bytes(current.read_bytes())
                print(f"{saved}: status {status}: {last}\n{errors[-3000:]}", flush=True)
            seed += 1
    took = time.monotonic() - start
    tried = sum(counts.values())
    used, how = counts["used"], " under the sanitizers" if sanitize else ""
    print(
        f"{target}{how}: {tried:,} inputs in {took:.0f} s, {used:,} used, "
        f"{tried - used:,} refused, {findings} findings"
    )
    return int(findings > 0)


SMALL = 6000  # bytes of a file that is kept


def collect(folder: Path, seed: int, seconds: float) -> int:
    """Keep a small file for each message that one is refused with, whatever numbers it names."""
    folder.mkdir(exist_ok=True)
    known = {path.name for path in folder.iterdir()}
    made, rng = bases(), Rng(seed)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if rng.random() < 0.5:
            data = metadata_input(rng, made)
        else:
            try:
                path = stored(folder / "input.tmp", weight_of(changed_parts(rng, made)))
            except (TypeError, ValueError, SafetensorError):
                continue  # what a file cannot say
            data = path.read_bytes()
            path.unlink()
        if len(data) > SMALL:
            continue
        try:
            use_bytes(data)
        except REFUSALS as error:
            text = re.sub(
                r"[^a-z]+", "-", re.sub(r"^.*safetensors: |'.*?'|\[.*?\]", "", str(error))
            )
            name = text.strip("-")[:40] + (".pt" if data[:2] == b"PK" else ".safetensors")
            if name not in known:
                known.add(name)
                (folder / name).write_bytes(data)
    print(f"{folder}: {len(known)} files")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sanitize", action="store_true", help="compiled codecs under sanitizers")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="use a saved input again")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--library", help=argparse.SUPPRESS)
    parser.add_argument("--collect", type=Path, metavar="DIR", help="keep files that are refused")
    args = parser.parse_args()
    if args.collect:
        return collect(args.collect, args.seed, args.seconds)
    if args.replay:
        print(outcome(TARGETS[args.target][1], pickle.loads(args.replay.read_bytes())))
        return 0
    if args.child:
        return child(args.target, args.seed, args.seconds, args.child, args.library)
    return fuzz(args.target, args.seconds, args.seed, args.sanitize)


if __name__ == "__main__":
    sys.exit(main())
