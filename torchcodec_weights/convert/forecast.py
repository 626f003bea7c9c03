"""What `compress` would do: tensors, sizes, and the time by a sample. Nothing is written."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from torchcodec_weights.convert.encoded import memory_of, read_weight
from torchcodec_weights.convert.plan import Choice, Task, make_plan, read_file
from torchcodec_weights.convert.source import Source
from torchcodec_weights.models.huggingface import read_small_files
from torchcodec_weights.models.quantize import encode_weight

_SAMPLE = 2**22  # weights that are encoded to learn the speed
_MB = 10**6


@dataclass(frozen=True)
class Forecast:
    """What would be done.

    Attributes:
        tasks: the tensors that would be encoded.
        copied_bytes: of all other tensors.
        bits_per_weight: of the sample.
        weights_per_second: of the sample.
        sample: name of the tensor that the sample is of.
    """

    tasks: tuple[Task, ...]
    copied_bytes: int
    bits_per_weight: float
    weights_per_second: float
    sample: str

    def __str__(self) -> str:
        width = max(len(task.name) for task in self.tasks)
        lines = [f"{'weight':{width}}  {'shape':>16}  dtype     file"]
        lines += [
            f"{task.name:{width}}  {' x '.join(map(str, task.stored.shape)):>16}  "
            f"{task.dtype:8}  {task.file}"
            for task in self.tasks
        ]
        weights = sum(task.weights for task in self.tasks)
        dense = sum(task.stored.nbytes for task in self.tasks)
        coded = weights * self.bits_per_weight / 8
        seconds = weights / self.weights_per_second
        memory = max(memory_of(task) for task in self.tasks)
        return "\n".join(
            [
                *lines,
                f"{len(self.tasks)} weights, {weights:,} numbers: {dense / _MB:,.1f} MB, about "
                f"{coded / _MB:,.1f} MB encoded. Not encoded: {self.copied_bytes / _MB:,.1f} MB.",
                f"About {_duration(seconds)} here, at {self.weights_per_second / 1e6:.2f} million "
                f"weights a second in a sample of {self.sample}; memory of the largest: "
                f"{memory / _MB:,.0f} MB.",
            ]
        )


def forecast(source: Source, choice: Choice) -> Forecast:
    """Plan, and encode some rows of the largest tensor.

    Raises:
        ValueError, CodecError, OSError: as `make_plan` and `encode_part`.
    """
    with tempfile.TemporaryDirectory() as place:
        small = source.small_files(Path(place))
        if not source.is_file:
            read_small_files(small)
        files = [read_file(source, name) for name in source.weight_files(small)]
        plan = make_plan(source, files, small, choice)
    tasks = tuple(plan.tasks.values())
    largest = max(tasks, key=lambda task: task.weights)
    row = max(1, largest.weights // largest.stored.shape[0])
    weight, _ = read_weight(source, largest, rows=max(1, _SAMPLE // row))
    start = time.perf_counter()
    coded = encode_weight(weight, largest.config, largest.name)
    seconds = time.perf_counter() - start
    bits = 8 * weight.element_size() if coded is None else coded.bits_per_weight
    encoded = sum(task.stored.nbytes for task in tasks)
    everything = sum(t.nbytes for file in files for t in file.header.tensors.values())
    speed = weight.numel() / seconds
    return Forecast(tasks, everything - encoded, bits, speed, largest.name)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
