"""The blocks of a model: a row of modules, each of which takes what the one before it returns.

transformers has no list of which part of a model that is, nor of what else a block is called with.
So the model's own `forward` is tried, with blocks that note how they are called and compute
nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchcodec_weights.calibration.score import call_model

_PLAIN = bool, int, float, str, torch.dtype, torch.device
_HIDDEN = "hidden_states"


class NotByBlocksError(Exception):
    """A model cannot be run block by block; the message says why."""


class _StopForward(BaseException):
    """Ends a forward pass that is not needed to its end."""


@dataclass(frozen=True)
class Call:
    """What a block is called with beside hidden states.

    Attributes:
        args: positional arguments after the hidden states, or all, if these are named.
        kwargs: named arguments without the hidden states.
        named: whether the hidden states are an argument of this name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool

    def to(self, forward: Callable[..., Any], hidden: Tensor) -> Any:
        """What `forward` returns for hidden states."""
        if self.named:
            return forward(*self.args, **{_HIDDEN: hidden}, **self.kwargs)
        return forward(hidden, *self.args, **self.kwargs)


class Blocks:
    """The blocks of a model, which may be on the meta device.

    Attributes:
        path: name of their list in the model.
        modules: the blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find the list of modules that holds most of a model.

        Raises:
            NotByBlocksError: there is none, or it is an encoder's or decoder's of two.
        """
        lists = {
            path: sum(parameter.numel() for parameter in module.parameters())
            for path, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module)
        }
        if not lists:
            raise NotByBlocksError(f"{type(model).__name__} has no list of blocks")
        self._model = model
        self.path = max(lists, key=lambda path: lists[path])
        self.modules = [*model.get_submodule(self.path).children()]
        self._items: int | None = None  # of the tuple that a block returns; None for a tensor

    def __len__(self) -> int:
        return len(self.modules)

    def name(self, number: int) -> str:
        """The name of a block in the model."""
        return f"{self.path}.{number}"

    def run(self, number: int, call: Call, hidden: Tensor) -> Tensor:
        """The hidden states that a block returns.

        Raises:
            NotByBlocksError: it fails, or returns something else beside them.
        """
        with _reasons(self.name(number)):
            output = call.to(self.modules[number], hidden)
            first, items = _first(output)
            if items != self._items:
                raise NotByBlocksError(f"{self.name(number)} returns another type than the first")
        if first.shape != hidden.shape or first.dtype != hidden.dtype:
            raise NotByBlocksError(
                f"{self.name(number)} makes {first.dtype} {tuple(first.shape)} of {hidden.dtype} "
                f"{tuple(hidden.shape)}"
            )
        return first

    def try_first(self, example: Any) -> None:
        """Learn what a block returns, and try what is around the blocks.

        The first block and all that is no block must have their values.

        Args:
            example: input of the model, as `call_model` takes it.

        Raises:
            NotByBlocksError: the model or the block fails, or blocks are called more than once.
        """
        with torch.no_grad():
            hidden, call = self.before(example)
            with _reasons(self.name(0)):
                _, self._items = _first(call.to(self.modules[0], hidden))
            self.after(example, hidden)

    def before(self, example: Any) -> tuple[Tensor, Call]:
        """The hidden states that the first block takes, and what it is called with beside."""
        found: list[tuple[Tensor, Call]] = []

        def stop(number: int, *args: Any, **kwargs: Any) -> None:
            found.append(_split(args, kwargs))
            raise _StopForward

        self._forward(example, stop)
        if not found:
            raise NotByBlocksError(f"{self.name(0)} is not called")
        return found[0]

    def calls(self, example: Any) -> tuple[Tensor, list[Call]]:
        """The hidden states that the first block takes, and what each block is called with.

        Raises:
            NotByBlocksError: blocks are not called once each, one after the other; the model
                changes what they return; or it passes something else from block to block.
        """
        calls: list[Call] = []
        start: Tensor | None = None
        expected: Tensor | None = None

        def note(number: int, *args: Any, **kwargs: Any) -> Any:
            nonlocal start, expected
            hidden, call = _split(args, kwargs)
            if number != len(calls):
                raise NotByBlocksError(f"{self.name(number)} is not called once, in its turn")
            if expected is not None and hidden is not expected:
                raise NotByBlocksError(
                    f"the model changes what {self.name(number - 1)} returns before "
                    f"{self.name(number)} takes it"
                )
            for name, value in [*enumerate(call.args, start=1), *call.kwargs.items()]:
                _check_argument(f"{self.name(number)} takes {name!r}", value)
            calls.append(call)
            start = hidden.detach() if start is None else start
            if len(calls) == len(self):
                raise _StopForward
            # Whatever later blocks take that is made of it requires a gradient too.
            expected = torch.zeros_like(hidden).detach().requires_grad_()
            return self._returned(expected)

        self._forward(example, note)
        if start is None or len(calls) != len(self):
            raise NotByBlocksError(f"{self.name(len(calls))} is not called")
        return start, calls

    def after(self, example: Any, hidden: Tensor) -> Any:
        """The output of the model where the last block returns `hidden`."""
        called: list[int] = []

        def skip(number: int, *args: Any, **kwargs: Any) -> Any:
            if number != len(called):
                raise NotByBlocksError(f"{self.name(number)} is not called once, in its turn")
            called.append(number)
            last = number == len(self) - 1
            return self._returned(hidden if last else _split(args, kwargs)[0])

        return self._forward(example, skip)

    def _returned(self, hidden: Tensor) -> Any:
        return hidden if self._items is None else (hidden, *[None] * (self._items - 1))

    def _forward(self, example: Any, function: Callable[..., Any]) -> Any:
        """Call the model, with a function of numbers and arguments in place of the blocks."""
        with _replaced(self.modules, function), _reasons(type(self._model).__name__):
            try:
                return call_model(self._model, example)
            except _StopForward:
                return None


@contextmanager
def without_cache(model: Any) -> Iterator[None]:
    """Let a model of transformers keep no keys and values, which would pass from call to call."""
    config: Any = getattr(model, "config", None)
    inner: Any = getattr(config, "get_text_config", lambda: None)()
    configs: list[Any] = [c for c in (config, inner) if hasattr(c, "use_cache")]
    kept = [(c, c.use_cache) for c in configs]
    try:
        for c in configs:
            c.use_cache = False
        yield
    finally:
        for c, value in kept:
            c.use_cache = value


@contextmanager
def _replaced(modules: Sequence[nn.Module], function: Callable[..., Any]) -> Iterator[None]:
    """Calls of modules go to a function of their number and the arguments."""
    try:
        for number, module in enumerate(modules):
            module.forward = partial(function, number)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


@contextmanager
def _reasons(what: str) -> Iterator[None]:
    """Errors of a model's own code as the reason why it cannot be run so."""
    try:
        yield
    except (NotByBlocksError, _StopForward, OSError):
        raise
    except Exception as error:
        raise NotByBlocksError(f"{what} fails: {type(error).__name__}: {error}") from error


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if args and isinstance(args[0], Tensor):
        return args[0], Call(args[1:], kwargs, False)
    if isinstance(kwargs.get(_HIDDEN), Tensor):
        rest = {name: value for name, value in kwargs.items() if name != _HIDDEN}
        return kwargs[_HIDDEN], Call(args, rest, True)
    raise NotByBlocksError("a block takes no hidden states as its first argument")


def _first(output: Any) -> tuple[Tensor, int | None]:
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        if any(item is not None for item in output[1:]):
            raise NotByBlocksError("a block returns more than hidden states")
        return output[0], len(output)
    raise NotByBlocksError(f"a block returns {type(output).__name__}")


def _check_argument(what: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise NotByBlocksError(f"{what}, which depends on blocks before it or on weights")
    elif isinstance(value, tuple):
        for item in value:
            _check_argument(what, item)
    elif value is not None and not isinstance(value, _PLAIN):
        raise NotByBlocksError(f"{what}, {type(value).__name__}, which may pass on state")
