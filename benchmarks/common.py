"""What the benchmarks share: their options, the file that they write, the clock, the machine.

Benchmarks of quality keep their rows in `torchcodec_weights.evaluation.rows.Rows` and go on from
them. Those of speed write all results of one run at once, as times of two runs do not compare.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.system.files import unfinished
from torchcodec_weights.system.workers import core_count


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with `--json` that shows a program's docstring as it is."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write what is measured there")
    return made


def write(path: Path | None, results: Any) -> None:
    """Write results as JSON; nothing where `path` is None."""
    if path is not None:
        with unfinished(path) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")


def machine() -> str:
    """The processor, the cores that this process may use, and PyTorch's version."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown'}, {core_count()} cores, torch {torch.__version__}"


def gaussian(rows: int, cols: int) -> Tensor:
    """Independent Gaussian weights of variance one, float32 (rows, cols), always the same."""
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


def fastest_preset(codec: str) -> str | None:
    """The first of a codec's presets; None where it has none."""
    return next(iter(get_codec(codec).presets), None)


def seconds(call: Callable[[], Any], turns: int) -> tuple[Any, list[float]]:
    """Call so many times; the last result, and the seconds that each call took."""
    taken = []
    for _ in range(turns):
        start = time.perf_counter()
        result = call()
        taken.append(time.perf_counter() - start)
    return result, taken


@torch.inference_mode()
def tokens_per_second(model: Any, prompt: Tensor, tokens: int, **options: Any) -> float:
    """Generate so many tokens with a model of transformers, greedy, after two that do not count."""
    greedy = {"do_sample": False, "pad_token_id": 0, **options}
    model.generate(prompt, max_new_tokens=2, **greedy)
    start = time.perf_counter()
    new = model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, **greedy)
    assert new.shape[1] == prompt.shape[1] + tokens
    return tokens / (time.perf_counter() - start)


@dataclass(frozen=True)
class Threads:
    """Times of the same work on one thread and on two.

    Attributes:
        one, two: medians over the turns, in seconds.
        ratio: median over the turns of one thread's time over that of two.
    """

    one: float
    two: float
    ratio: float


def one_and_two_threads(call: Callable[[], Any], turns: int) -> Threads:
    """Time a call on one of PyTorch's threads and on two, by turns: both see the same machine."""
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(turns):
        for threads, taken in times.items():
            torch.set_num_threads(threads)
            taken += seconds(call, 1)[1]
    ratio = statistics.median(one / two for one, two in zip(times[1], times[2], strict=True))
    return Threads(statistics.median(times[1]), statistics.median(times[2]), ratio)
