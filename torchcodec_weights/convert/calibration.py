"""Configurations by `calibrate` for the tensors of a checkpoint larger than memory.

What is found of a part of the model (a block, or what is around the blocks) is written to a file
when it is whole, so that a killed run goes on with the next part. Moments, which are the largest,
are found again for the tensors that are encoded next, and then forgotten.
"""

import json
import re
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchcodec_weights.calibration.allocation import Demand, allocate, demand_of
from torchcodec_weights.calibration.blocks import Blocks
from torchcodec_weights.calibration.blockwise import BlockwiseModel, Part
from torchcodec_weights.calibration.calibrate import resolved
from torchcodec_weights.calibration.matrices import MatrixFile
from torchcodec_weights.calibration.read_text import inputs_of_text
from torchcodec_weights.calibration.selection import selected_parameters
from torchcodec_weights.calibration.statistics import Statistics
from torchcodec_weights.calibration.text import LENGTH, own_text
from torchcodec_weights.convert.modules import StoredModules
from torchcodec_weights.convert.plan import Choice, Plan, Task
from torchcodec_weights.convert.source import Source
from torchcodec_weights.encoder.rate import EXACT_WEIGHTS
from torchcodec_weights.encoder.spread import Spread
from torchcodec_weights.matrix.importance import Importance
from torchcodec_weights.models.checkpoint import safetensors_bytes
from torchcodec_weights.models.huggingface import load_model, skeleton
from torchcodec_weights.system.files import write_durably
from torchcodec_weights.system.memory import available, release_freed, resident

SELF = "self"
"""In place of a text's path: the text that the model writes itself."""

_WHOLE = 2**31  # bytes beside a whole model that runs, for activations, logits and caches
_BESIDE = 2**28  # bytes beside a block that runs
_LOGITS = 16  # bytes for each logit: it, its probability, their gradients
_FEEDBACK = 24  # bytes for each of the moments among which error feedback is computed
_INPUTS = "inputs.json"
_TABLE = "layers"


@dataclass(frozen=True)
class _Layer:
    """What is kept of a weight's statistics.

    Attributes:
        rows, columns: of its `Importance`; no columns where these are moments.
        demand: for the allocation of bits.
    """

    rows: NDArray[np.float32]
    columns: NDArray[np.float32] | None
    demand: Demand


def has_begun(folder: Path) -> bool:
    """Whether the directory of a `BlockCalibration` holds something that it can go on with."""
    return (folder / _INPUTS).is_file()


def fits_in_memory(source: Source, max_memory: int | None) -> bool:
    """Whether a model can be loaded whole, and run.

    Args:
        source: a directory here.
        max_memory: bytes that the process may take; None for what the machine has.
    """
    return _memory_of_model(source) <= (max_memory or available())


def _memory_of_model(source: Source) -> int:
    assert source.place is not None
    names = source.weight_files(source.place)
    return _WHOLE + sum(source.size(name) for name in names)


def memory_of_feedback(task: Task) -> int:
    """Bytes that encoding a calibrated tensor takes beside those without calibration."""
    cols = task.weights // task.stored.shape[0]
    return _FEEDBACK * cols**2


def by_blocks(plan: Plan) -> list[list[Task]]:
    """The tensors of a plan, those of a block together, and each that is in none alone.

    Raises:
        NotByBlocksError: the model has no blocks.
    """
    assert plan.model is not None
    path = Blocks(plan.model).path
    groups: dict[str, list[Task]] = {}
    for task in plan.tasks.values():
        block = re.match(rf"{re.escape(path)}\.\d+\.", task.name)
        groups.setdefault(block[0] if block else task.name, []).append(task)
    return [*groups.values()]


class BlockCalibration:
    """Calibrates the tensors of one plan."""

    def __init__(
        self, source: Source, plan: Plan, choice: Choice, folder: Path, max_memory: int | None
    ) -> None:
        """Prepare inputs, and try the model.

        Args:
            source: of a model's directory here.
            plan: of it.
            choice: with `calibrate`.
            folder: for what is found. What a killed run of the same plan and choice left is used.
            max_memory: bytes that the process may take; None for what the machine has.

        Raises:
            NotByBlocksError: the model cannot be run block by block; says why.
            ValueError: the model is to write the text, and does not fit in memory; or the text
                holds no token.
        """
        assert plan.model is not None
        folder.mkdir(exist_ok=True)
        self._plan = plan
        self._config = choice.config
        self._folder = folder
        small = source.small_files(folder)
        model = skeleton(small, plan.model.dtype)
        if model.dtype == torch.float16:
            model.float()  # whose gradients neither vanish nor overflow
        names = choice.calibrated(model)
        weights = selected_parameters(model, lambda module, name: f"{name}.weight" in names)
        self._names: dict[str, str] = {}  # of tensors, to the first module that has them
        first = {weight: name for name, weight in reversed(weights.items())}
        for name, weight in weights.items():
            self._names[f"{name}.weight"] = first[weight]
        blocks = Blocks(model)
        modules = StoredModules(model, source, plan.files)
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
        self._check_memory(modules, blocks, vocabulary, max_memory)

        def loaded(block: str | None) -> AbstractContextManager[None]:
            name = blocks.path if block is None else block
            return modules.loaded(name, outside=block is None)

        inputs = self._inputs(source, choice.calibrate or SELF, small, model, max_memory)
        self._model = BlockwiseModel(model, blocks, weights, inputs, loaded, folder)
        self._order = [*weights]
        self._layers: dict[str, _Layer] = {}
        self._rates: dict[str, float] = {}

    def _check_memory(
        self, modules: StoredModules, blocks: Blocks, vocabulary: int, max_memory: int | None
    ) -> None:
        sizes = [modules.size(blocks.name(number)) for number in range(len(blocks))]
        outside = modules.size("") - sum(sizes) + sizes[0] + _LOGITS * LENGTH * vocabulary
        widest = max(memory_of_feedback(task) for task in self._plan.tasks.values())
        needed = resident() + _BESIDE + max(max(sizes) + widest, outside)
        if max_memory is not None and needed > max_memory:
            raise ValueError(
                f"--max-memory={max_memory / 2**30:.2f} GiB: allowed with --calibrate: "
                f"{needed / 2**30:.2f} GiB or more"
            )

    def _inputs(
        self, source: Source, text: str, small: Path, model: Any, max_memory: int | None
    ) -> list[dict[str, Tensor]]:
        """What the model is tried on, the same in each run."""
        path = self._folder / _INPUTS
        if not path.is_file():
            inputs = self._new_inputs(source, text, small, model, max_memory)
            table = [{name: value.tolist() for name, value in entry.items()} for entry in inputs]
            write_durably(path, [json.dumps(table).encode()])
        table = json.loads(path.read_bytes())
        return [{name: torch.tensor(value) for name, value in entry.items()} for entry in table]

    def _new_inputs(
        self, source: Source, text: str, small: Path, model: Any, max_memory: int | None
    ) -> list[dict[str, Tensor]]:
        if text != SELF:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(small, local_files_only=True)
            return inputs_of_text(Path(text).read_text(encoding="utf-8"), tokenizer, model)
        if not fits_in_memory(source, max_memory):
            raise ValueError(
                f"--calibrate={SELF}: to write text the model must be in memory, which takes "
                f"{_memory_of_model(source) / 2**30:.1f} GiB of "
                f"{(max_memory or available()) / 2**30:.1f}: allowed for this model: the path of a "
                "text file"
            )
        assert source.place is not None
        tokens = own_text(load_model(source.place))
        release_freed()
        return [{"input_ids": row} for row in tokens.split(1)]

    def collect(self) -> None:
        """Find gradients and bits of all weights, of those parts where a run did not yet.

        Raises:
            NotByBlocksError, ValueError, OSError: as `BlockwiseModel`.
        """
        parts = self._model.parts
        if not all(self._known(part) for part in parts):
            self._model.run_forward()
            for part, statistics in self._model.run_backward(self._known):
                self._keep(part, statistics)
        for part in parts:
            self._layers.update(self._read(part))
        named = [name for name in self._order if name in self._layers]
        if named:
            codec, bits, settings = resolved(self._config)
            demands = [self._layers[name].demand for name in named]
            rates = allocate(demands, codec.rate_curve(settings), bits)
            self._rates = dict(zip(named, rates.tolist(), strict=True))

    def _path(self, part: Part) -> Path:
        return self._folder / f"{part.key}.safetensors"

    def _known(self, part: Part) -> bool:
        return self._path(part).is_file()

    def _keep(self, part: Part, statistics: Statistics) -> None:
        codec, _, settings = resolved(self._config)
        tensors: dict[str, Tensor] = {}
        table = {}
        for name, importance in statistics.items():
            weight = self._model.weight(name)
            key = self._first(name)
            if importance is None or weight.numel() < EXACT_WEIGHTS or key in table:
                continue
            demand = demand_of(weight, importance, codec, settings)
            table[key] = {
                "first": demand.spread.first,
                "overhead": demand.overhead,
                "size": demand.size,
            }
            tensors[f"{key}.counts"] = torch.from_numpy(demand.spread.counts)
            tensors[f"{key}.rows"] = torch.from_numpy(importance.rows)
            if importance.moments.ndim == 1:
                tensors[f"{key}.columns"] = torch.tensor(importance.columns)
        write_durably(self._path(part), safetensors_bytes(tensors, {_TABLE: json.dumps(table)}))

    def _read(self, part: Part) -> dict[str, _Layer]:
        layers = {}
        with safetensors.safe_open(self._path(part), "numpy") as file:
            keys = {*file.keys()}
            for name, entry in json.loads(file.metadata()[_TABLE]).items():
                spread = Spread.of(file.get_tensor(f"{name}.counts"), entry["first"])
                columns = f"{name}.columns"
                layers[name] = _Layer(
                    file.get_tensor(f"{name}.rows"),
                    file.get_tensor(columns) if columns in keys else None,
                    Demand(spread, entry["overhead"], entry["size"]),
                )
        return layers

    def _first(self, name: str) -> str:
        """The first module that has the weight of a module."""
        return self._names[f"{name}.weight"]

    def tasks(self, tasks: Sequence[Task], *, alone: bool) -> Generator[list[Task]]:
        """Tensors to encode one part of the model after the other, with what was found of them.

        What comes with each part holds until the next is asked for, by when its tensors are
        encoded. Tensors that are not calibrated come last, as they are.

        Args:
            tasks: of the plan, those that are missing.
            alone: whether no other process may need the hidden states of parts that are finished,
                so that they are removed.
        """
        left = [*tasks]
        groups: list[tuple[Part, list[Task]]] = []
        for part in reversed(self._model.parts):
            here = {self._first(name) for name in part.weights}
            mine = [task for task in left if self._names.get(task.name) in here]
            left = [task for task in left if task not in mine]
            groups.append((part, mine))
        for part, mine in groups:
            if mine:  # whose hidden states may be removed already, where an encoded tensor was lost
                self._model.run_forward(max(part.number, 0))
        for part, mine in groups:
            if mine:
                yield from self._tasks_of(part, mine)
            if alone:
                self._model.forget(part)
        if left:
            yield left

    def _tasks_of(self, part: Part, tasks: list[Task]) -> Generator[list[Task]]:
        known = {task.name: self._layers.get(self._names[task.name]) for task in tasks}
        file = MatrixFile.temporary(self._folder)
        try:
            by_moments = any(layer and layer.columns is None for layer in known.values())
            found = self._model.moments(part, file) if by_moments else {}
            places = {self._first(name): place for name, place in found.items()}
            calibrated = []
            for task in tasks:
                name, config = task.name, self._config
                if (layer := known[name]) is not None:
                    first = self._names[name]
                    moments = layer.columns
                    moments = file.read(places[first]) if moments is None else moments
                    importance = Importance(layer.rows, moments)
                    config = config.with_importance(importance, self._rates[first])
                calibrated.append(replace(task, config=config))
            yield calibrated
        finally:
            file.close()
