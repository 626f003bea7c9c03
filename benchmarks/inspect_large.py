"""`inspect` of a compressed directory shaped as Llama 3 70B: 560 weights, 26 GB at 3 bits.

    python benchmarks/inspect_large.py --folder /tmp/large --json out.json

`inspect` reads headers and scales alone. So one layer is encoded, of normal numbers in the real
shapes, and all 80 have its headers, containers' headers and scales, each weight with the digest of
its own name; where bitstreams and dense weights would be, the files have holes. Embedding and head
stay dense (`--embeddings dense`). The directory takes 23 MB of the disk, and can be
inspected, but not decoded. It is made once: a minute on two cores, and 3 GB of memory.

Measured are whole processes of the program `torchcodec-weights`, after the files' pages were
dropped from the system's cache ("cold"; Python's own files stay in it) and with them there
("warm").
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import torch
from common import machine, write
from streaming import Shape
from torch import Tensor

from torchcodec_weights import CodecTensor, codec_weight_only
from torchcodec_weights.format.container import header_bytes
from torchcodec_weights.format.layout import table_of_strings
from torchcodec_weights.format.safetensors import file_header, stored_order
from torchcodec_weights.models.checkpoint import FORMAT_DTYPES, flatten, raw_bytes

SHAPE = Shape(hidden=8192, intermediate=28672, keys=1024, vocabulary=128256)
LAYERS, FILES, TURNS = 80, 30, 5
CONFIG = codec_weight_only("ectcq", bits=3, preset="fast")
_NAMES = {dtype: name for name, dtype in FORMAT_DTYPES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="gets the directory, or has it")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    if not args.folder.exists():
        make(args.folder)
    files = sorted(args.folder.glob("*.safetensors"))
    states = [file.stat() for file in files]
    results = {
        "machine": machine(),
        "encoded_tensors": LAYERS * len(SHAPE.layer()),
        "encoded_weights": LAYERS * SHAPE.layer_weights(),
        "files": len(files),
        "bytes": sum(state.st_size for state in states),
        "disk_bytes": 512 * sum(state.st_blocks for state in states),
    }
    inspected(args.folder)  # compiles Python's modules, as installers do
    for name in ("cold", "warm"):
        turns = []
        for _ in range(TURNS):
            if name == "cold":
                forget(files)
            turns.append(inspected(args.folder))
        results[name] = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        print(f"{name}: {results[name]['seconds']:.2f} s for the whole process")
    write(args.json, results)


PROGRAM = """
import re, sys, time
from pathlib import Path
from torchcodec_weights_cli import main
status = main()
print("cpu", time.process_time(), file=sys.stderr)
# Not ru_maxrss, which a process inherits from the one that started it.
status_text = Path("/proc/self/status").read_text()
print("peak", re.search("VmHWM:\\s*(\\d+)", status_text)[1], file=sys.stderr)
sys.exit(status)
"""


def inspected(folder: Path) -> dict[str, float]:
    """Time of a process from its start to its end, time of processors, and peak memory."""
    command = [sys.executable, "-c", PROGRAM, "inspect", str(folder)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    seconds = time.perf_counter() - start
    cpu, peak = re.findall(r"(?:cpu|peak) (\S+)\n", done.stderr)
    return {"seconds": seconds, "cpu_seconds": float(cpu), "peak_bytes": 1024 * int(peak)}


def forget(files: list[Path]) -> None:
    """Drop the pages of files from the system's cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # only what is on the device can be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def make(folder: Path) -> None:
    """Write the directory."""
    coded = {}
    for number, (name, shape) in enumerate(SHAPE.layer().items()):
        generator = torch.Generator().manual_seed(number)
        weight = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        coded[name] = CodecTensor.from_hp(weight, CONFIG)
    names = [f"model.layers.{n}.{name}.weight" for n in range(LAYERS) for name in coded]
    norm = torch.ones(SHAPE.hidden, dtype=torch.bfloat16)
    matrix = torch.empty(SHAPE.vocabulary, SHAPE.hidden, dtype=torch.bfloat16, device="meta")
    tensors: list[dict[str, Tensor]] = [{} for _ in range(FILES)]
    tensors[0] = {"model.embed_tokens.weight": matrix, "lm_head.weight": matrix}
    tensors[0]["model.norm.weight"] = norm
    for number in range(LAYERS):
        own = tensors[1 + number * (FILES - 1) // LAYERS]
        prefix = f"model.layers.{number}"
        own |= {f"{prefix}.{name}.weight": weight for name, weight in coded.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            own[f"{prefix}.{name}.weight"] = norm
    folder.mkdir()
    places: dict[str, str] = {}
    for number, own in enumerate(tensors):
        file = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        places.update(dict.fromkeys(write_file(folder / file, own, names), file))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def write_file(path: Path, tensors: Mapping[str, Tensor], listed: list[str]) -> list[str]:
    """Write a file with holes; returns the names of the tensors in it.

    Args:
        path: of the file.
        tensors: its weights; of those on the meta device nothing is written.
        listed: names of the encoded weights of all files.
    """
    inner: dict[str, Tensor] = {}
    entries = {}
    for name, tensor in tensors.items():
        parts, entry = flatten(name, tensor)
        inner |= parts
        if isinstance(tensor, CodecTensor):
            entries[name] = json.dumps(entry)
    # Hashes are not those of the weights: `inspect` reads their text alone.
    decoded = {name: sha256(name.encode()).hexdigest() for name in entries}
    checksums = {name: f"{0:08x}" for name in tensors if name not in entries}
    strings = table_of_strings({}, listed, entries, decoded, checksums, {})
    sizes = {name: (_NAMES[t.dtype], tuple(t.shape), t.nbytes) for name, t in inner.items()}
    with path.open("wb") as file:
        file.write(file_header(sizes, strings))
        for name in stored_order(sizes):
            start = file.tell()
            file.write(written(name, inner[name]))
            file.seek(start + inner[name].nbytes)
        file.truncate()
    return [*inner]


def written(name: str, tensor: Tensor) -> bytes | memoryview:
    """The first bytes of a tensor, as many as `inspect` reads."""
    if tensor.is_meta:
        return b""
    data = raw_bytes(tensor)
    return header_bytes(data) if name.endswith("_qdata") else data


if __name__ == "__main__":
    main()
