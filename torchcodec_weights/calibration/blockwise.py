"""Statistics of a model whose blocks are in memory one at a time.

    states       the hidden states that each block takes, by a forward pass from block to block
    statistics   gradients and moments, by a backward pass from the last block to the first, each
                 of which runs again on the hidden states that it took
    moments      of one block at a time, again, when its weights are encoded: those of all blocks
                 would take more than twice the bytes of a model

Hidden states of all inputs, at each block, lie in files, and of gradients those at one block. Sums
are those of `collect_statistics`, in the same order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from torchcodec_weights.calibration.accumulate import (
    accumulate,
    accumulate_moments,
    is_plain_linear,
)
from torchcodec_weights.calibration.blocks import Blocks, Call, NotByBlocksError, without_cache
from torchcodec_weights.calibration.matrices import MatrixFile, Place
from torchcodec_weights.calibration.score import score
from torchcodec_weights.calibration.state import undisturbed
from torchcodec_weights.calibration.states import StateFiles, Writer
from torchcodec_weights.calibration.statistics import Statistics
from torchcodec_weights.system.memory import release_freed

HEAD, EMBEDDING = "head", "embedding"
"""The parts of a model after its blocks, and before them."""


@dataclass(frozen=True)
class Part:
    """A block, or what stands before or after all blocks.

    Attributes:
        key: `HEAD`, `EMBEDDING`, or the name of a block.
        number: of the block; that of the blocks for `HEAD`, and −1 for `EMBEDDING`.
        weights: names of the modules whose statistics are wanted. Those that share a weight are
            all there, but for modules that are not Linear where another is.
    """

    key: str
    number: int
    weights: tuple[str, ...]


class BlockwiseModel:
    """Runs a model block by block.

    Attributes:
        parts: from the head to the embedding, as a backward pass meets them. The embedding is left
            out where no statistics of it are wanted.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        weights: Mapping[str, nn.Parameter],
        examples: Sequence[Any],
        loaded: Callable[[str | None], AbstractContextManager[None]],
        folder: Path,
    ) -> None:
        """Try how the model runs its blocks.

        Args:
            model: on the meta device, in evaluation mode, in float32 or bfloat16.
            blocks: of this model.
            weights: whose statistics are wanted, by the names of their modules.
            examples: inputs, as in `collect_statistics`.
            loaded: gives values to the tensors of the block of a name, or of all that is in no
                block for None, as long as the context lasts.
            folder: for files of hidden states and temporary ones. Those that a killed run with the
                same model and inputs left are used.

        Raises:
            NotByBlocksError: the model cannot be run so; says why.
        """
        self._model = model
        self._examples = examples
        self._loaded = loaded
        self._folder = folder
        self.blocks = blocks
        outside = self._outside([*weights])
        with without_cache(model), loaded(None):
            with loaded(self.blocks.name(0)):
                self.blocks.try_first(examples[0])
            self._calls, self._states, before = self._trace(outside)
        self.parts = self._parts(weights, before)

    def _outside(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if not name.startswith(f"{self.blocks.path}.")]

    def _trace(self, outside: Sequence[str]) -> tuple[list[list[Call]], StateFiles, set[str]]:
        """What blocks are called with, hidden states of the first, modules that run before it."""
        before: set[str] = set()
        hooks = [
            self._model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: before.add(name)
            )
            for name in outside
        ]
        trainable = [self.weight(name) for name in outside]
        try:
            with undisturbed(self._model, 0, trainable):
                found = [self.blocks.calls(example) for example in self._examples]
        finally:
            for hook in hooks:
                hook.remove()
        hidden = [tensor for tensor, _ in found]
        dtypes = {tensor.dtype for tensor in hidden}
        if len(dtypes) != 1:
            raise NotByBlocksError(f"hidden states are {' and '.join(map(str, dtypes))}")
        states = StateFiles(self._folder, [tensor.shape for tensor in hidden], dtypes.pop())
        if not states.exists(_states(0)):
            with states.written(_states(0)) as writer:
                for number, tensor in enumerate(hidden):
                    writer.put(number, tensor)
        return [calls for _, calls in found], states, before

    def _parts(self, weights: Mapping[str, nn.Parameter], before: set[str]) -> list[Part]:
        sharing: dict[nn.Parameter, list[str]] = {}
        for name, weight in weights.items():
            sharing.setdefault(weight, []).append(name)
        names: dict[int, list[str]] = {}
        for shared in sharing.values():
            # Where a Linear shares its weight with an embedding, the Linear's statistics count.
            counted = [
                name for name in shared if is_plain_linear(self._model.get_submodule(name))
            ] or shared
            numbers = {self._number(name, before) for name in counted}
            if len(numbers) > 1:
                raise NotByBlocksError(f"{' and '.join(counted)} share a weight")
            names.setdefault(numbers.pop(), []).extend(counted)
        last = len(self.blocks)
        parts = [Part(HEAD, last, tuple(names.get(last, ())))]
        parts += [
            Part(self.blocks.name(number), number, tuple(names.get(number, ())))
            for number in reversed(range(last))
        ]
        return parts + ([Part(EMBEDDING, -1, tuple(names[-1]))] if -1 in names else [])

    def _number(self, name: str, before: set[str]) -> int:
        if name.startswith(f"{self.blocks.path}."):
            return int(name[len(self.blocks.path) + 1 :].split(".")[0])
        return -1 if name in before else len(self.blocks)

    def run_forward(self, last: int | None = None) -> None:
        """Write the hidden states that blocks take, of those blocks where they are missing.

        Args:
            last: number of the block whose states are needed, and others only for these; None for
                all.

        Raises:
            NotByBlocksError: a block cannot be run so.
            OSError: the disk is full.
        """
        count = len(self.blocks)
        last = count if last is None else last
        first = max(n for n in range(last + 1) if self._states.exists(_states(n)))
        for number in range(first, last):
            with self._loaded(self.blocks.name(number)):
                inputs = tqdm(
                    range(len(self._examples)),
                    desc=f"states of block {number + 1} of {count}",
                    unit="input",
                    leave=False,
                )
                with self._states.written(_states(number + 1)) as writer, inputs, torch.no_grad():
                    for example in inputs:
                        writer.put(example, self._output(number, example))
            release_freed()

    def run_backward(self, known: Callable[[Part], bool]) -> Iterator[tuple[Part, Statistics]]:
        """Statistics of the parts, from the last to the first.

        After each, the caller has stored what it needs when it asks for the next. The part's
        weights have their values until then, the statistics are closed then.

        Args:
            known: whether a part's statistics were stored by an earlier run.

        Raises:
            NotByBlocksError: a block cannot be run so.
            ValueError: inputs, gradients or outputs are not finite.
            OSError: the disk is full.
        """
        for part in self.parts:
            if not known(part):
                file = MatrixFile.temporary(self._folder)
                try:
                    with self._loaded_part(part):
                        yield part, self._statistics(part, file)
                finally:
                    file.close()
                release_freed()
            self._states.remove(_gradients(part.number + 1))

    def moments(self, part: Part, file: MatrixFile) -> dict[str, Place]:
        """Moments of the inputs of a part's Linear layers, by the names of their modules.

        Args:
            part: one of `parts`.
            file: gets them.
        """
        with self._loaded_part(part), without_cache(self._model):
            found = accumulate_moments(
                self._model,
                self._parameters(part),
                range(len(self._examples)),
                file,
                partial(self._call, part),
                f"moments of {part.key}",
            )
        release_freed()
        return found

    def forget(self, part: Part) -> None:
        """Remove the hidden states that a part takes; its moments are not asked for again."""
        if part.number >= 0:
            self._states.remove(_states(part.number))

    def _loaded_part(self, part: Part) -> AbstractContextManager[None]:
        return self._loaded(None if part.key in (HEAD, EMBEDDING) else part.key)

    def weight(self, name: str) -> nn.Parameter:
        """The weight of a module, with values while those of its part are in memory."""
        return self._model.get_parameter(f"{name}.weight")

    def _parameters(self, part: Part) -> dict[str, nn.Parameter]:
        return {name: self.weight(name) for name in part.weights}

    def _statistics(self, part: Part, file: MatrixFile) -> Statistics:
        def run(writer: Writer | None) -> Statistics:
            sums = accumulate(
                self._model,
                self._parameters(part),
                range(len(self._examples)),
                file,
                partial(self._score, part, writer),
                f"statistics of {part.key}",
            )
            return Statistics(sums, file, part.key)

        with without_cache(self._model):
            if part.key == EMBEDDING:
                return run(None)
            with self._states.written(_gradients(part.number)) as writer:
                return run(writer)

    def _score(self, part: Part, writer: Writer | None, example: int) -> Tensor:
        """A scalar whose gradients by what the part holds are those of the model's score."""
        if part.key == EMBEDDING:
            hidden, _ = self.blocks.before(self._examples[example])
            return self._weighed(part, hidden, example)
        hidden = self._states.read(_states(part.number), example).requires_grad_()
        assert writer is not None
        hidden.register_hook(partial(writer.put, example))
        if part.key == HEAD:
            return score(self.blocks.after(self._examples[example], hidden))
        call = self._calls[example][part.number]
        return self._weighed(part, self.blocks.run(part.number, call, hidden), example)

    def _weighed(self, part: Part, output: Tensor, example: int) -> Tensor:
        """A scalar whose gradient by a part's output is that of the model's score."""
        gradient = self._states.read(_gradients(part.number + 1), example)
        return (output * gradient).sum()

    def _output(self, number: int, example: int) -> Tensor:
        hidden = self._states.read(_states(number), example)
        return self.blocks.run(number, self._calls[example][number], hidden)

    def _call(self, part: Part, example: int) -> None:
        if part.key == HEAD:
            hidden = self._states.read(_states(part.number), example)
            self.blocks.after(self._examples[example], hidden)
        elif part.key == EMBEDDING:
            self.blocks.before(self._examples[example])
        else:
            self._output(part.number, example)


def _states(number: int) -> str:
    return f"states-{number:04d}"


def _gradients(number: int) -> str:
    return f"gradients-{number:04d}"
