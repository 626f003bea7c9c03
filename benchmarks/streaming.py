"""Compressing a checkpoint larger than memory: time, speed, peak memory, disk; kills; two workers.

    python benchmarks/streaming.py --gigabytes 1 --folder /tmp/streaming --json out.json
    python benchmarks/streaming.py --gigabytes 20 --kills 50 --folder DIR --json out.json

The checkpoint is shaped as Llama 3.1 8B, of as many layers as make the size; its weights are normal
numbers, drawn shard by shard with seeds of their own, so that a shard is in memory at once and no
checkpoint is fetched. The disk must hold the checkpoint and twice what it is compressed to. Started
again with the same JSON, it goes on after what that has.
"""

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine, write

from torchcodec_weights.models.checkpoint import write_safetensors


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, but for its layers."""

    hidden: int = 4096
    intermediate: int = 14336
    keys: int = 1024
    vocabulary: int = 32000
    head: int = 128

    def layer(self) -> dict[str, tuple[int, int]]:
        """Shapes of a layer's matrices."""
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.keys, self.hidden),
            "self_attn.v_proj": (self.keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def layer_weights(self) -> int:
        """Weights of a layer that are encoded."""
        return sum(rows * cols for rows, cols in self.layer().values())

    def layers(self, gigabytes: float) -> int:
        """Number of layers whose model takes at least these bytes in bfloat16."""
        rest = 1e9 * gigabytes / 2 - 2 * self.vocabulary * self.hidden
        return max(1, -int(-rest // self.layer_weights()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of bfloat16 (default: 1)")
    parser.add_argument("--folder", type=Path, required=True, help="gets model and outputs")
    parser.add_argument("--bits", default="3")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--kills", type=int, default=5, help="0 for none")
    parser.add_argument("--workers", type=int, default=2, help="1 for none")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    shape = Shape()
    model, size = args.folder / "model", shape.layers(args.gigabytes)
    if not (model / "config.json").exists():
        draw(model, shape, size)
    weights = size * shape.layer_weights()
    options = ["--bits", args.bits, "--preset", args.preset]
    results: dict[str, Any] = {
        "machine": machine(),
        "options": options,
        "model_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
        "encoded_weights": weights,
        "largest_float32_bytes": 4 * shape.vocabulary * shape.hidden,
        "largest_encoded_float32_bytes": 4 * shape.hidden * shape.intermediate,
    }
    if args.json.exists():
        before = json.loads(args.json.read_text())
        if all(before[name] == results[name] for name in results):
            results = before
    if "one process" not in results:
        out = args.folder / "one"
        results["one process"] = measured([program("compress", model, out, *options)], weights)
        results["sha256"] = digest(out)
        check(out, weights, results)
        shutil.rmtree(out)
        write(args.json, results)
    expected = results["sha256"]
    if args.kills and "kills" not in results:
        out = args.folder / "killed"
        seconds = results["one process"]["seconds"] / args.kills
        results["kills"] = killed(program("compress", model, out, *options), args.kills, seconds)
        results["kills_same_bytes"] = digest(out) == expected
        shutil.rmtree(out)
        write(args.json, results)
    if args.workers > 1:
        out = args.folder / "workers"
        shares = [f"{number}/{args.workers}" for number in range(args.workers)]
        commands = [
            program("compress", model, out, *options, "--worker", share) for share in shares
        ]
        results[f"{args.workers} workers"] = measured(commands, weights)
        results["last step"] = measured([program("compress", model, out, *options)], weights)
        results["workers_same_bytes"] = digest(out) == expected
        shutil.rmtree(out)
        write(args.json, results)


def check(out: Path, weights: int, results: dict[str, Any]) -> None:
    """Measure `inspect` and `verify` of an output."""
    results["output_bytes"] = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    for name in ("inspect", "verify"):
        results[name] = measured([program(name, out)], weights)
    verify = results["verify"]["seconds_without_imports"]
    results["verify_gigabytes_per_second"] = results["output_bytes"] / 1e9 / verify


def draw(folder: Path, model: Shape, layers: int) -> None:
    """Write a checkpoint, one file for each layer and one for the rest."""
    from transformers import LlamaConfig

    folder.mkdir(exist_ok=True)
    places: dict[str, str] = {}
    for number in range(layers + 1):
        generator = torch.Generator().manual_seed(number)
        shapes: dict[str, tuple[int, ...]] = {
            f"model.layers.{number}.{name}.weight": shape for name, shape in model.layer().items()
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{number}.{norm}.weight"] = (model.hidden,)
        if number == layers:
            shapes = {
                "model.embed_tokens.weight": (model.vocabulary, model.hidden),
                "lm_head.weight": (model.vocabulary, model.hidden),
                "model.norm.weight": (model.hidden,),
            }
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, shape in shapes.items()
        }
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        write_safetensors(tensors, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(tensors, file))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=model.hidden // model.head,
        num_key_value_heads=model.keys // model.head,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)


PROGRAM = """
import re, sys, time
from pathlib import Path
from torchcodec_weights.cli import compress, main, run
start = time.perf_counter()
status = main(sys.argv[1:])
print("took", time.perf_counter() - start)
print("cpu", time.process_time())
# Not ru_maxrss, which a process inherits from the one that started it.
print("peak", re.search("VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
sys.exit(status)
"""


def program(*arguments: Any) -> list[str]:
    """A command in a process that prints its time without imports, and its peak memory in KiB."""
    return [sys.executable, "-c", PROGRAM, *map(str, arguments)]


def measured(commands: list[list[str]], weights: int) -> dict[str, float]:
    """Time, speed and the largest peak of memory of processes that run at one time."""
    start = time.perf_counter()
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for command in commands
    ]
    outputs = [process.communicate()[0] for process in processes]
    seconds = time.perf_counter() - start
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{commands} failed: {outputs}")
    took = [float(output.split("took ")[1].split()[0]) for output in outputs]
    peaks = [1024 * int(output.split("peak ")[1]) for output in outputs]
    return {
        "seconds": seconds,
        "cpu_seconds": sum(float(output.split("cpu ")[1].split()[0]) for output in outputs),
        "seconds_without_imports": max(took),
        "mweights_per_second": weights / seconds / 1e6,
        "peak_bytes": max(peaks),
    }


def killed(command: list[str], count: int, most: float) -> dict[str, Any]:
    """Kill a run at random moments, start it again, and let it end."""
    rng = random.Random(0)
    kills = 0
    start = time.perf_counter()
    for _ in range(count):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(2, 8 + most))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += process.wait() == -signal.SIGKILL
        else:
            break
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {"kills": kills, "seconds": time.perf_counter() - start}


def digest(folder: Path) -> str:
    """One SHA-256 over the names and bytes of all files."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            while piece := file.read(2**24):
                found.update(piece)
    return found.hexdigest()


if __name__ == "__main__":
    main()
