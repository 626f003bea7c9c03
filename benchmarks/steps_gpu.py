"""Steps of `gpu.py --first`, each a process: environment, smoke, products, model, profile.

    python benchmarks/steps_gpu.py smoke --rehearse

What is found goes to the file that the environment variable RESULTS names, after each measurement.

In a rehearsal there is no GPU: kernels run on the CPU as in tests/test_gpu_kernels.py, weights are
small, times are those of the CPU and mean nothing, and CUDA graphs are left out.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gpu_measures
import numpy as np
import torch
from common import gaussian
from torch import Tensor
from torch.nn import functional as F

from torchcodec_weights import CodecTensor, available_codecs, codec_weight_only
from torchcodec_weights.codecs.ectcq import gpu
from torchcodec_weights.codecs.ectcq.columns import is_by_columns
from torchcodec_weights.codecs.ectcq.resident import index_matrix
from torchcodec_weights.matrix.importance import Importance
from torchcodec_weights.matrix.opened import open_matrix
from torchcodec_weights.system import files

TOKENS = (1, 2, 4, 8, 16)
TURNS = 7
KINDS = ("rows", "columns")
LIBRARIES = ("libcuda.so.1", "libnvcuvid.so.1", "libnvidia-encode.so.1")


class Machine(ABC):
    """What weights are decoded and multiplied on."""

    shapes: tuple[tuple[int, int], ...]
    bits: tuple[int, ...] = (2, 3, 4)
    """Of weights by rows. By columns the first alone: with importance, encoding takes long."""

    @abstractmethod
    def put(self, array: Any) -> Any:
        """A tensor or a weight, there."""

    @abstractmethod
    def product(self, x: Tensor, weight: Any) -> Tensor:
        """x · Wᵀ."""

    @abstractmethod
    def decode(self, weight: Any) -> Tensor:
        """To bfloat16."""

    @abstractmethod
    def seconds(self, calls: Sequence[Callable[[], Any]]) -> float:
        """That a call takes, when all follow each other; the median over turns."""

    def copies(self, weight: Any, nbytes: int) -> list[Any]:
        """So many that they exceed the cache, the weight itself among them."""
        return [weight]


class Card(Machine):
    """The GPU."""

    shapes = ((4096, 4096), (14336, 4096))

    def put(self, array: Any) -> Any:
        return array.cuda()

    def product(self, x: Tensor, weight: Any) -> Tensor:
        return F.linear(x, weight)

    def decode(self, weight: Any) -> Tensor:
        return weight.dequantize()

    def seconds(self, calls: Sequence[Callable[[], Any]]) -> float:
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _results = [call() for call in calls]  # each writes to memory of its own
        times = []
        for _ in range(TURNS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1000 / len(calls))
        return statistics.median(times)

    def copies(self, weight: Any, nbytes: int) -> list[Any]:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        return [weight, *(weight.clone() for _ in range(2 * cache // nbytes))]


class Rehearsal(Machine):
    """The CPU in the GPU's place."""

    shapes = ((128, 256),)
    bits = (2,)

    def __init__(self) -> None:
        from test_gpu_kernels import build, host_launch  # type: ignore[import-not-found]

        folder = Path(tempfile.mkdtemp())
        self._launch = host_launch(build(folder / "kernels.so", "-O2"))

    def put(self, array: Any) -> Any:
        if not isinstance(array, CodecTensor):
            return array
        return index_matrix(open_matrix(*array.coded), self._launch), array.shape[0]

    def product(self, x: Tensor, weight: Any) -> Tensor:
        if isinstance(weight, Tensor):
            return F.linear(x, weight)
        resident, rows = weight
        if len(x) > gpu.MAX_TOKENS:
            return x @ self.decode(weight).T
        return resident.multiply(x, 0, rows, 0, None)

    def decode(self, weight: Any) -> Tensor:
        resident, rows = weight
        return resident.decode(0, rows, torch.bfloat16)

    def seconds(self, calls: Sequence[Callable[[], Any]]) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)


def encoded(shape: tuple[int, int], bits: float, kind: str, weight: Tensor) -> CodecTensor:
    """A weight in the fastest preset, by rows, or by columns as calibration makes them."""
    config = codec_weight_only("ectcq", bits=bits, preset="fast")
    if kind == "columns":
        random = np.random.default_rng(0)
        rows = np.exp(random.uniform(-1, 1, shape[0])).astype(np.float32)
        moments = np.diag(np.exp(random.uniform(-2, 2, shape[1]))).astype(np.float32)
        config = config.with_importance(Importance(rows, moments), bits)
    made = CodecTensor.from_hp(weight, config)
    if is_by_columns(made.header.private) != (kind == "columns"):
        raise SystemExit(f"{shape} at {bits} bits was not coded by {kind}")
    return made


def note(results: dict[str, Any]) -> None:
    """Write down what is known so far."""
    if path := os.environ.get("RESULTS"):
        files.replace(Path(path), json.dumps(results, indent=1).encode())
    name = next(reversed(results))
    print(name, json.dumps(results[name]), flush=True)


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def environment(machine: Machine) -> None:
    """What is there."""
    results: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    results["cores"] = len(os.sched_getaffinity(0))
    results["libraries"] = {name: _loads(name) for name in LIBRARIES}
    results["decoders"] = {info.name: str(info.decoders) for info in available_codecs()}
    note(results)
    if isinstance(machine, Card):
        query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        results["card"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        found = torch.cuda.get_device_properties(0)
        results["multiprocessors"] = found.multi_processor_count
        results["l2_bytes"] = found.L2_cache_size
        start = time.perf_counter()
        kernels = gpu.kernels(0)
        results["compile_seconds"] = time.perf_counter() - start
        results["resources"] = {name: list(kernels.resources(name)) for name in kernels.names}
        note(results)


def smoke(machine: Machine) -> None:
    """Each kernel on small weights; raises where one returns something else than the CPU."""
    results: dict[str, Any] = {}
    for kind in KINDS:
        for shape in ((96, 512), (300, 384)):
            weight = gaussian(*shape)
            weight[::40, ::50] *= 30  # outliers
            coded = encoded(shape, 2, kind, weight.bfloat16())
            there, expected = machine.put(coded), coded.dequantize()
            bits = machine.decode(there).cpu().view(torch.int16)
            if not torch.equal(bits, expected.view(torch.int16)):
                raise SystemExit(f"{kind} {shape}: the weight differs from the CPU's")
            for tokens in TOKENS:
                x = gaussian(tokens, shape[1]).bfloat16()
                exact = x.double() @ expected.double().T
                product = machine.product(machine.put(x), there).cpu().double()
                error = float((product - exact).abs().max() / exact.abs().max())
                if not error < 1.5e-2:
                    raise SystemExit(f"{kind} {shape} {tokens} tokens: error {error}")
                results[f"{kind} {shape[0]}x{shape[1]} {tokens}"] = error
            note(results)


def products(machine: Machine) -> None:
    """Product and decode, beside dense weights; the floor is bytes over the bandwidth of a copy."""
    results: dict[str, Any] = {}
    large = machine.put(
        torch.empty(2**30 if isinstance(machine, Card) else 2**20, dtype=torch.uint8)
    )
    target = torch.empty_like(large)
    bandwidth = 2 * large.nbytes / machine.seconds([lambda: target.copy_(large)])
    results["copy_bytes_per_second"] = bandwidth
    note(results)
    for shape in machine.shapes:
        count = shape[0] * shape[1]
        weight = gaussian(*shape).bfloat16()
        dense = machine.copies(machine.put(weight), 2 * count)
        row: dict[str, Any] = {"floor_weights_per_second": bandwidth / 2}
        for tokens in TOKENS:
            x = machine.put(gaussian(tokens, shape[1]).bfloat16())
            calls = [partial(machine.product, x, each) for each in dense]
            row[f"product_{tokens}"] = count / machine.seconds(calls)
        results[f"{shape[0]}x{shape[1]} dense"] = row
        note(results)
        del dense
        chosen = [("rows", bits) for bits in machine.bits]
        for kind, bits in (*chosen, ("columns", machine.bits[0])):
            start = time.perf_counter()
            coded = encoded(shape, bits, kind, weight)
            row = {"encode_seconds": time.perf_counter() - start}
            stored = coded.bits_per_weight * count / 8
            row["bits_per_weight"] = coded.bits_per_weight
            row["floor_weights_per_second"] = count * bandwidth / stored
            row["floor_decode"] = count * bandwidth / (stored + 2 * count)
            weights = _copies(machine, coded, int(stored))
            for tokens in TOKENS:
                x = machine.put(gaussian(tokens, shape[1]).bfloat16())
                calls = [partial(machine.product, x, each) for each in weights]
                row[f"product_{tokens}"] = count / machine.seconds(calls)
            calls = [partial(machine.decode, each) for each in weights]
            row["decode"] = count / machine.seconds(calls)
            results[f"{shape[0]}x{shape[1]} {bits} {kind}"] = row
            note(results)
            del weights


def _copies(machine: Machine, coded: CodecTensor, nbytes: int) -> list[Any]:
    there = machine.put(coded)
    return machine.copies(there, nbytes)


def model(machine: Machine) -> None:
    """Tokens per second of a model of Llama 7B's shape; in a rehearsal, steps of a small one."""
    results: dict[str, Any] = {}
    for method in ("ectcq:2", "dense"):
        if isinstance(machine, Card):
            results[method] = gpu_measures.model(method)
            torch.cuda.empty_cache()
        else:
            small = gpu_measures.LlamaShape(1, 128, 256, 4, 256, context=4, new_tokens=4)
            own = gpu_measures.stepper(method, small, "cpu")
            results[method] = {"tokens": [int(own.step()) for _ in range(2)]}
        note(results)


def profile(machine: Machine) -> None:
    """What Nsight Compute looks at: one product of each kind, and one decode."""
    shape = machine.shapes[0]
    x = machine.put(gaussian(1, shape[1]).bfloat16())
    for kind in KINDS:
        there = machine.put(encoded(shape, 2, kind, gaussian(*shape).bfloat16()))
        machine.product(x, there)
        if kind == "rows":
            machine.decode(there)
    note({"profiled": list(KINDS)})


STEPS = {
    "environment": environment,
    "smoke": smoke,
    "products": products,
    "model": model,
    "profile": profile,
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("step", choices=STEPS)
    options.add_argument("--rehearse", action="store_true")
    args = options.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        sys.exit("PyTorch sees no CUDA device")
    with torch.no_grad():
        STEPS[args.step](Rehearsal() if args.rehearse else Card())


if __name__ == "__main__":
    main()
