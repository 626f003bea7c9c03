"""What `compress` would do: tensors, sizes, and the time by samples. Nothing is written."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from torchcodec_weights.convert.calibration import memory_of_feedback
from torchcodec_weights.convert.encoded import memory_of, read_weight
from torchcodec_weights.convert.plan import Choice, Task, make_plan, read_file
from torchcodec_weights.convert.source import Source
from torchcodec_weights.models.huggingface import read_small_files
from torchcodec_weights.models.quantize import encode_weight

_SAMPLE = 2**22  # weights that are encoded to learn the speed
_MB = 10**6


@dataclass(frozen=True)
class Sample:
    """Some rows of the largest of the tensors that are encoded alike.

    Attributes:
        name: of the tensor.
        weights: numbers in all tensors that are encoded alike.
        bits_per_weight: of the sample.
        weights_per_second: of the sample.
    """

    name: str
    weights: int
    bits_per_weight: float
    weights_per_second: float


@dataclass(frozen=True)
class Forecast:
    """What would be done.

    Attributes:
        tasks: the tensors that would be encoded.
        copied_bytes: of all other tensors.
        samples: one for each configuration.
        calibrated: whether bits would be given by calibration, for which nothing is run here.
    """

    tasks: tuple[Task, ...]
    copied_bytes: int
    samples: tuple[Sample, ...]
    calibrated: bool

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
        coded = sum(sample.weights * sample.bits_per_weight / 8 for sample in self.samples)
        seconds = sum(sample.weights / sample.weights_per_second for sample in self.samples)
        speeds = " and ".join(
            f"{sample.weights_per_second / 1e6:.2f} million weights a second in a sample of "
            f"{sample.name}"
            for sample in self.samples
        )
        memory = max(
            memory_of(task) + (memory_of_feedback(task) if self.calibrated else 0)
            for task in self.tasks
        )
        lines += [
            f"{len(self.tasks)} weights, {weights:,} numbers: {dense / _MB:,.1f} MB, about "
            f"{coded / _MB:,.1f} MB encoded. Not encoded: {self.copied_bytes / _MB:,.1f} MB.",
            f"About {_duration(seconds)} here, at {speeds}; memory of the largest: "
            f"{memory / _MB:,.0f} MB.",
        ]
        if self.calibrated:
            lines.append(
                "Calibration is not in this time: each block would be run three times, and errors "
                "carried from column to column."
            )
        return "\n".join(lines)


def forecast(source: Source, choice: Choice) -> Forecast:
    """Plan, and encode some rows of the largest tensor of each configuration.

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
    alike: dict[int, list[Task]] = {}
    for task in tasks:
        alike.setdefault(id(task.config), []).append(task)
    samples = tuple(_sample(source, group) for group in alike.values())
    encoded = sum(task.stored.nbytes for task in tasks)
    everything = sum(t.nbytes for file in files for t in file.header.tensors.values())
    return Forecast(tasks, everything - encoded, samples, choice.calibrate is not None)


def _sample(source: Source, tasks: list[Task]) -> Sample:
    largest = max(tasks, key=lambda task: task.weights)
    row = max(1, largest.weights // largest.stored.shape[0])
    weight, _ = read_weight(source, largest, rows=max(1, _SAMPLE // row))
    start = time.perf_counter()
    coded = encode_weight(weight, largest.config, largest.name)
    speed = weight.numel() / (time.perf_counter() - start)
    bits = 8 * weight.element_size() if coded is None else coded.bits_per_weight
    return Sample(largest.name, sum(task.weights for task in tasks), bits, speed)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
