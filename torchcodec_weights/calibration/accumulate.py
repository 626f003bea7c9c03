"""Hooks that sum up the inputs of layers and the gradients of their outputs."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from torchcodec_weights.calibration.matrices import MatrixFile, Place
from torchcodec_weights.calibration.state import undisturbed
from torchcodec_weights.third_party import version_of

_SEED = 0
_BLOCK = 1024
"""Tokens that are converted to float32 at once."""
_HALF_SCALES = 2.0**12, 2.0**6, 1.0, 2.0**-6
"""Factors of the score, tried in this order, so that gradients in float16 neither vanish (below
6e-8) nor overflow (65,504)."""


@dataclass(frozen=True)
class Sums:
    """What one weight's statistics are.

    Attributes:
        rows: float32 (rows,), see `Importance`.
        moments: where `Importance.moments` lie.
    """

    rows: NDArray[np.float32]
    moments: Place


class _InputsDifferError(Exception):
    """Layers that took the same inputs in an earlier example take different ones now."""


@dataclass(eq=False)
class _Layer:
    """A weight, and the modules that share it.

    Attributes:
        name: of the first module.
        linear: whether statistics come from inputs and outputs, not from the weight's gradient.
        shape: rows and columns of the weight as a matrix.
        rows: sum of squared gradients; None before the first.
        columns: the same by columns, of a weight that is not linear.
        example: what the present example adds to both.
        leader: the layer whose moments this one shares, or itself; None before the first call.
        born: number of the example that first reached it.
        calls: in the present example.
        tokens: in all examples.
        place: of the moments, of a leader.
    """

    name: str
    linear: bool
    shape: tuple[int, int]
    rows: Tensor | None = None
    columns: Tensor | None = None
    example: list[Tensor] = field(default_factory=list)
    leader: "_Layer | None" = None
    born: int = -1
    calls: int = 0
    tokens: int = 0
    place: Place | None = None


@dataclass(frozen=True)
class _Input:
    """A tensor, and the layer that first took it, in which of its calls."""

    tensor: weakref.ref[Tensor]
    version: int
    layer: _Layer
    call: int


def accumulate(
    model: nn.Module,
    selected: Mapping[str, nn.Parameter],
    examples: Sequence[Any],
    file: MatrixFile,
    score_of: Callable[[Any], Tensor],
    label: str = "statistics",
) -> dict[str, Sums | None]:
    """Statistics of weights over examples, each of which passes through the model once.

    Args:
        model: left as it was.
        selected: weights by the names of their modules.
        examples: what `score_of` takes.
        file: gets the moments; what it held is lost.
        score_of: calls the model, or the part of it that holds the weights; a scalar whose squared
            gradient is wanted.
        label: of the progress bar.

    Returns:
        By the names of `selected`; None where no input or no gradient came.

    Raises:
        ValueError: an input, a gradient or the output is not finite, or no gradient reaches the
            layers.
    """
    layers = _run(model, selected, examples, file, score_of, label, gradients=True)
    sums = {weight: _finished(layer, file) for weight, layer in layers.items()}
    return {name: sums[weight] for name, weight in selected.items()}


def accumulate_moments(
    model: nn.Module,
    selected: Mapping[str, nn.Parameter],
    examples: Sequence[Any],
    file: MatrixFile,
    call: Callable[[Any], object],
    label: str,
) -> dict[str, Place]:
    """The moments of `accumulate` alone, by forward passes, of the Linear layers.

    Args:
        model, selected, examples, file, label: as in `accumulate`.
        call: calls the model, or the part of it that holds the weights.

    Returns:
        By the names of those of `selected` that an input reached.

    Raises:
        ValueError: an input is not finite.
    """
    layers = _run(model, selected, examples, file, call, label, gradients=False)
    leaders = {name: layers[weight].leader for name, weight in selected.items()}
    return {
        name: leader.place
        for name, leader in leaders.items()
        if leader is not None and leader.place is not None and leader.tokens
    }


def _run(
    model: nn.Module,
    selected: Mapping[str, nn.Parameter],
    examples: Sequence[Any],
    file: MatrixFile,
    call: Callable[[Any], Any],
    label: str,
    *,
    gradients: bool,
) -> "dict[nn.Parameter, _Layer]":
    for shares in (True, False):
        layers = _layers(model, selected)
        trainable = [w for w, layer in layers.items() if gradients and not layer.linear]
        with undisturbed(model, _SEED, trainable), torch.set_grad_enabled(gradients):
            file.clear()
            try:
                _Pass(model, layers, file, shares, call, gradients).run(selected, examples, label)
                break
            except _InputsDifferError:
                continue  # starts again, each layer with moments of its own
    for layer in layers.values():
        _divide(layer, file)
    return layers


def _layers(model: nn.Module, selected: Mapping[str, nn.Parameter]) -> dict[nn.Parameter, _Layer]:
    layers: dict[nn.Parameter, _Layer] = {}
    for name, weight in selected.items():
        rows = weight.shape[0]
        layer = layers.setdefault(weight, _Layer(name, False, (rows, weight.numel() // rows)))
        # Where a Linear shares its weight with an embedding, the Linear's statistics count.
        layer.linear |= is_plain_linear(model.get_submodule(name))
    return layers


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module's statistics are found from its inputs and outputs."""
    # A subclass with a forward of its own may do anything with its weight.
    return type(module).forward is nn.Linear.forward


def _divide(layer: _Layer, file: MatrixFile) -> None:
    """Turn the sum of a layer's moments into their mean."""
    if layer.place is None or not layer.tokens:
        return
    moments = file.write(layer.place)
    moments /= layer.tokens
    _check_range(layer, moments.diagonal())


def _finished(layer: _Layer, file: MatrixFile) -> Sums | None:
    if layer.rows is None:
        return None
    if layer.columns is not None:
        place = file.append(layer.columns.shape)
        # On the scale of a Linear: the sum of rows · columns is that of the squared gradients.
        total = layer.columns.sum()
        file.write(place)[:] = (layer.columns / total if total else layer.columns).cpu().numpy()
    elif layer.leader is None or layer.leader.place is None or not layer.leader.tokens:
        return None
    else:
        place = layer.leader.place
    rows = layer.rows.cpu().numpy()
    _check_range(layer, rows)
    return Sums(rows, place)


def _check_range(layer: _Layer, sums: NDArray[np.float32]) -> None:
    if not np.isfinite(sums).all():
        raise ValueError(
            f"{layer.name}: the squares of its inputs or gradients exceed float32: sample_inputs, "
            "or the model, give values that are too large"
        )


class _Pass:
    """One pass over examples."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[nn.Parameter, _Layer],
        file: MatrixFile,
        shares: bool,
        call: Callable[[Any], Any],
        gradients: bool,
    ) -> None:
        self._model = model
        self._layers = layers
        self._file = file
        self._shares = shares
        self._call = call
        self._gradients = gradients
        self._number = 0
        self._inputs: dict[int, _Input] = {}
        self._in_backward = False
        self._not_finite: str | None = None
        half = any(p.dtype == torch.float16 for p in model.parameters())
        self._scales = _HALF_SCALES if half else (1.0,)

    def run(
        self, selected: Mapping[str, nn.Parameter], examples: Sequence[Any], label: str
    ) -> None:
        bar = tqdm(examples, desc=label, unit="input", leave=False)
        with self._hooks(selected), bar:
            for self._number, example in enumerate(bar):
                self._one(example)

    @contextmanager
    def _hooks(self, selected: Mapping[str, nn.Parameter]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, weight in selected.items():
                layer, module = self._layers[weight], self._model.get_submodule(name)
                if layer.linear and is_plain_linear(module):
                    # Before other hooks, which may change the output.
                    hook = partial(self._forward, layer)
                    handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
                    stack.callback(handle.remove)
                elif not layer.linear and self._gradients:
                    count = partial(self._count, layer)
                    stack.callback(module.register_forward_hook(count).remove)
            for weight, layer in self._layers.items():
                if not layer.linear and self._gradients:
                    take = partial(self._weight_gradient, layer)
                    stack.callback(weight.register_post_accumulate_grad_hook(take).remove)
            yield

    def _one(self, example: Any) -> None:
        for layer in self._layers.values():
            layer.calls = 0
        self._in_backward = False
        try:
            value = self._call(example)
        except ValueError as error:
            raise ValueError(f"input {self._number}: {error}") from error
        self._inputs.clear()
        self._check_followers()
        if not self._gradients:
            return
        if value.requires_grad:
            self._differentiate(value)
        elif any(layer.calls for layer in self._layers.values()):
            raise ValueError(
                f"input {self._number}: no gradient leads from the model's output to its layers: "
                "allowed: models that compute with gradients, and return what depends on a layer"
            )

    def _differentiate(self, value: Tensor) -> None:
        self._in_backward = True
        for scale in self._scales:
            self._not_finite = None
            for layer in self._layers.values():
                layer.example.clear()
            (value * scale).backward(retain_graph=scale != self._scales[-1])
            if self._not_finite is None:
                break
        else:
            raise ValueError(
                f"{self._not_finite}: the gradient of its output holds NaN or infinity at input "
                f"{self._number}: sample_inputs, or the model, give NaN or infinity"
            )
        for layer in self._layers.values():
            if layer.example:
                rows, *columns = (energy / scale**2 for energy in layer.example)
                layer.rows = rows if layer.rows is None else layer.rows + rows
                for energy in columns:
                    layer.columns = energy if layer.columns is None else layer.columns + energy
                layer.example.clear()

    def _forward(
        self, layer: _Layer, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor:
        # In the backward pass of a checkpoint the forward pass runs again.
        if not self._in_backward:
            self._take(layer, args[0] if args else kwargs["input"])
        if self._gradients and not output.requires_grad:
            # The clone is no leaf, so that the model may change it in place.
            output = output.detach().requires_grad_().clone()
        if output.requires_grad:  # not under a model's own no_grad
            output.register_hook(partial(self._output_gradient, layer))
        return output

    def _count(self, layer: _Layer, module: nn.Module, args: Any, output: Any) -> None:
        layer.calls += 1

    def _take(self, layer: _Layer, x: Tensor) -> None:
        """Count an input among a layer's moments, once for all layers that take it."""
        call = layer.calls
        layer.calls += 1
        version = 0 if x.is_inference() else version_of(x)
        seen = self._inputs.get(id(x))
        if seen is not None and (seen.tensor() is not x or seen.version != version):
            seen = None
        if layer.leader is None:
            layer.born = self._number
            # Not with a layer that has moments of earlier examples.
            shared = seen is not None and seen.call == call and seen.layer.born == layer.born
            layer.leader = seen.layer if seen is not None and shared and self._shares else layer
        if layer.leader is not layer:
            if seen is None or seen.layer is not layer.leader or seen.call != call:
                raise _InputsDifferError
            return
        if seen is None:
            self._inputs[id(x)] = _Input(weakref.ref(x), version, layer, call)
        self._add_moments(layer, x)

    def _check_followers(self) -> None:
        for layer in self._layers.values():
            if layer.leader is not None and layer.calls != layer.leader.calls:
                raise _InputsDifferError

    @torch.no_grad()
    def _add_moments(self, layer: _Layer, x: Tensor) -> None:
        if not torch.isfinite(x).all():
            raise ValueError(
                f"{layer.name}: its input holds NaN or infinity: sample_inputs, or the model, give "
                "NaN or infinity"
            )
        cols = layer.shape[1]
        if layer.place is None:
            layer.place = self._file.append((cols, cols))
        moments = torch.from_numpy(self._file.write(layer.place))
        on_host = x.device.type == "cpu"
        total = moments if on_host else torch.zeros(cols, cols, device=x.device)
        tokens = x.reshape(-1, cols)
        for block in tokens.split(_BLOCK):
            block = block.float()
            total.addmm_(block.T, block)
        if not on_host:
            moments += total.cpu()
        layer.tokens += len(tokens)

    def _output_gradient(self, layer: _Layer, gradient: Tensor) -> None:
        self._add_energies(layer, [_energy(gradient.reshape(-1, layer.shape[0]), 0)])

    def _weight_gradient(self, layer: _Layer, weight: Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.reshape(layer.shape)
        weight.grad = None  # one layer's at a time
        self._add_energies(layer, [_energy(gradient, 1), _energy(gradient, 0)])

    def _add_energies(self, layer: _Layer, energies: list[Tensor]) -> None:
        if self._not_finite is None and not all(torch.isfinite(e).all() for e in energies):
            self._not_finite = layer.name
        if layer.example:
            energies = [old + new for old, new in zip(layer.example, energies, strict=True)]
        layer.example = energies


def _energy(gradient: Tensor, dim: int) -> Tensor:
    """Sum of squares over a dimension, float32, without a matrix of squares."""
    return torch.linalg.vector_norm(gradient, dim=dim, dtype=torch.float32).square()
