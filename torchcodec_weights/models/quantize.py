"""`quantize_`: replaces the weights of a model by CodecTensors, many layers at once.

torchao's `quantize_` works too, but encodes one layer after the other. This one lets torchao select
the layers of a configuration, and then encodes them in parallel with one progress bar.
"""

import re
import reprlib
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
import torchao.quantization
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler
from tqdm.auto import tqdm

from torchcodec_weights.codecs.video import ffmpeg
from torchcodec_weights.config import CodecWeightOnlyConfig
from torchcodec_weights.encoder.rate import EXACT_WEIGHTS
from torchcodec_weights.errors import RateError
from torchcodec_weights.system.workers import core_count
from torchcodec_weights.tensor import CodecTensor, check_weight
from torchcodec_weights.third_party import is_linear

_PARAMETER = "weight"
_NOT_COMPILED = "encoders of torchcodec_weights read and write bytes"
_CALLER = 5
"""`stacklevel` for whoever calls `quantize_`, which has a frame of `torch.compiler.disable`."""
_CONFIGS = "codec_weight_only(...), or a FqnToConfig of names to such"


@dataclass(frozen=True)
class Job:
    """A weight to encode.

    Attributes:
        config: what to encode it with.
        owners: every (module, parameter name) that shares it.
        names: of these parameters in the model, the selected one first.
    """

    config: CodecWeightOnlyConfig
    owners: list[tuple[nn.Module, str]]
    names: list[str]

    @property
    def weight(self) -> torch.Tensor:
        module, name = self.owners[0]
        return getattr(module, name)


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Task(Generic[T]):
    """What `run_tasks` runs.

    Attributes:
        weights: how many it encodes.
        memory: bytes that it takes at most.
        run: takes the pool that runs encoders.
    """

    weights: int
    memory: int
    run: Callable[[ThreadPoolExecutor], T]


_found: ContextVar[list[tuple[nn.Module, str, CodecWeightOnlyConfig]] | None] = ContextVar(
    "_found", default=None
)


@register_quantize_module_handler(CodecWeightOnlyConfig)
@torch.compiler.disable(reason=_NOT_COMPILED)
def _handle(
    module: nn.Module, config: CodecWeightOnlyConfig, *, parameter_name: str = _PARAMETER
) -> nn.Module:
    """Called by torchao for every module that a configuration selects."""
    found = _found.get()
    if found is not None:
        found.append((module, parameter_name, config))
        return module
    weight = _weight_of(module, parameter_name, "")
    check_weight(weight)
    coded = encode_weight(weight, config, f"{type(module).__name__}.{parameter_name}")
    if coded is not None:
        _swap([(module, parameter_name)], coded)
    _sequential_progress(config).update()
    return module


@torch.compiler.disable(reason=_NOT_COMPILED)
def quantize_(
    model: nn.Module,
    config: AOBaseConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Encode the weights of a model in place, several layers at once, with progress.

    Accepts the arguments of `torchao.quantization.quantize_`, other torchao configurations
    included. A weight that several modules share is encoded once and stays shared; if one of the
    modules is not selected, it stays dense, with a warning. A matrix of fewer than 65,536 weights
    that cannot be coded in the wanted bits stays dense, with a warning.

    It warns if a configuration or filter selects nothing, and of names in a `FqnToConfig` that no
    module or parameter has.

    In a function that is compiled, the graph ends before it and goes on after it.

    After an interrupt (Ctrl-C) the model is usable: each layer is either encoded or unchanged.

    Args:
        model: changed in place.
        config: `codec_weight_only(...)` or a `FqnToConfig` of several.
        filter_fn: takes (module, name), says whether to encode the module's weight; all Linear
            layers by default. None with a `FqnToConfig`.
        device: move modules there first, as in torchao.

    Raises:
        ValueError: an argument has a wrong type or value, a selected module has no weight, or a
            weight cannot be encoded (dtype, dimensions, NaN or infinity). Raised before any weight
            is encoded.
        RateError: a matrix of 65,536 weights or more cannot reach the target.
        CodecError: the codec is not available, or the encoder failed.
    """
    jobs = select_weights(model, config, filter_fn, device)
    for job in jobs:
        _check(job)
    _run(jobs)


def select_weights(
    model: nn.Module,
    config: AOBaseConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    device: torch.device | str | None = None,
) -> list[Job]:
    """The weights that `quantize_` encodes with the same arguments, the largest first.

    The model may be on the meta device: values are not looked at. Warns as `quantize_` does.

    Raises:
        ValueError: an argument has a wrong type or value, or a selected module has no weight.
    """
    if filter_fn is None and not isinstance(config, torchao.quantization.FqnToConfig):
        filter_fn = is_linear
    _check_arguments(model, config, filter_fn)
    with _collect() as found:
        torchao.quantization.quantize_(model, config, filter_fn, device)
    _warn_of_nothing(model, config, found)
    return _jobs(model, found)


def encode_tensors(
    tensors: Mapping[str, torch.Tensor], config: CodecWeightOnlyConfig
) -> dict[str, torch.Tensor]:
    """Encode weights that are not in a model, several at once, with progress.

    A tensor with several names is encoded once and shared. Small matrices and errors are treated as
    in `quantize_`.

    Args:
        tensors: names to float32, float16 or bfloat16 weights, finite, of two dimensions or more.
        config: codec and target.

    Returns:
        Names to CodecTensors, or to the tensor itself if it stays dense.
    """
    holders: dict[int, nn.Module] = {}
    jobs = []
    for name, tensor in tensors.items():
        if id(tensor) not in holders:
            holder = holders[id(tensor)] = nn.Module()
            holder.register_parameter(_PARAMETER, nn.Parameter(tensor, requires_grad=False))
            jobs.append(Job(config, [(holder, _PARAMETER)], [name]))
            _check(jobs[-1])
    _run(sorted(jobs, key=lambda job: -job.weight.numel()))
    return {
        name: holders[id(tensor)].get_parameter(_PARAMETER).data for name, tensor in tensors.items()
    }


def _check_arguments(model: Any, config: Any, filter_fn: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={reprlib.repr(model)}: allowed: a torch.nn.Module")
    if not isinstance(config, AOBaseConfig):
        raise ValueError(f"config={reprlib.repr(config)}: allowed: {_CONFIGS}")
    if filter_fn is not None and not callable(filter_fn):
        raise ValueError(
            f"filter_fn={reprlib.repr(filter_fn)}: allowed: a function of (module, name), or None"
        )
    if not isinstance(config, torchao.quantization.FqnToConfig):
        return
    for name, inner in config.fqn_to_config.items():
        if not isinstance(name, str):
            raise ValueError(f"config has {name!r} as a name: allowed: strings")
        if inner is not None and not isinstance(inner, AOBaseConfig):
            raise ValueError(
                f"config has {name!r}: {reprlib.repr(inner)}: allowed: codec_weight_only(...), "
                "another configuration of torchao, or None"
            )
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as error:
                raise ValueError(
                    f"config has {name!r}, which is no regular expression: {error}"
                ) from None


def _warn_of_nothing(
    model: nn.Module,
    config: AOBaseConfig,
    found: list[tuple[nn.Module, str, CodecWeightOnlyConfig]],
) -> None:
    """Warn of a configuration, or names in it, that select nothing."""
    ours = [config]
    if isinstance(config, torchao.quantization.FqnToConfig):
        ours = [*config.fqn_to_config.values()]
        names = [name for name, _ in model.named_modules()]
        names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
        unknown = [key for key in config.fqn_to_config if not _is_there(key, names)]
        if unknown:
            warnings.warn(
                f"config: {type(model).__name__} has no module and no parameter of the name "
                f"{', '.join(map(repr, unknown))}",
                stacklevel=_CALLER,
            )
    if not found and (not ours or any(isinstance(c, CodecWeightOnlyConfig) for c in ours)):
        warnings.warn(
            f"no weight of {type(model).__name__} was selected, so none is encoded: by default "
            "those of torch.nn.Linear are, others by filter_fn or a FqnToConfig",
            stacklevel=_CALLER,
        )


def _is_there(key: str, names: list[str]) -> bool:
    if key.startswith("re:"):
        pattern = re.compile(key[3:])
        return any(pattern.fullmatch(name) for name in names)
    return key == "_default" or key in names


@contextmanager
def _collect() -> Iterator[list[tuple[nn.Module, str, CodecWeightOnlyConfig]]]:
    found: list[tuple[nn.Module, str, CodecWeightOnlyConfig]] = []
    token = _found.set(found)
    try:
        yield found
    finally:
        _found.reset(token)


def _jobs(model: nn.Module, found: list[tuple[nn.Module, str, CodecWeightOnlyConfig]]) -> list[Job]:
    """One job for each distinct weight, the largest first so that none is left for the end.

    Raises:
        ValueError: a module has no such parameter.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    names: dict[tuple[int, str], str] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module, name))
            names[id(module), name] = f"{module_name}.{name}".lstrip(".")
    wanted = {(id(module), name) for module, name, _ in found}
    jobs: dict[int, Job] = {}
    modules = {id(module): name for name, module in model.named_modules()}
    for module, name, config in found:
        weight = _weight_of(module, name, modules.get(id(module), ""))
        shared = owners.get(id(weight), [(module, name)])
        others = [names[id(m), n] for m, n in shared if (id(m), n) not in wanted]
        mine = names.get((id(module), name), name)
        if others:
            warnings.warn(
                f"{mine} is shared with {', '.join(others)} and stays dense: encoding only one of "
                "them would store the weight twice",
                stacklevel=_CALLER,
            )
        else:
            known = [names[id(m), n] for m, n in shared if (id(m), n) in names]
            ordered = [mine, *(other for other in known if other != mine)]
            jobs.setdefault(id(weight), Job(config, shared, ordered))
    return sorted(jobs.values(), key=lambda job: -job.weight.numel())


def _weight_of(module: nn.Module, name: str, module_name: str) -> torch.Tensor:
    weight = getattr(module, name, None)
    if not isinstance(weight, torch.Tensor):
        raise ValueError(
            f"{module_name or 'model'} is selected, a {type(module).__name__} without a parameter "
            f"{name!r}: allowed: modules that have one"
        )
    return weight


def _check(job: Job) -> None:
    try:
        check_weight(job.weight)
    except ValueError as error:
        raise ValueError(f"{job.names[0]}: {error}") from None
    check_encoder(job.config)


def check_encoder(config: CodecWeightOnlyConfig) -> None:
    """Raise CodecError if a codec cannot encode here, ValueError if it refuses its parameters."""
    codec, _, settings = config.resolve()
    codec.require(encoder=True)
    codec.check_parameters(settings)


def _run(jobs: list[Job]) -> None:
    """Encode jobs in parallel and replace each weight when it is done."""
    total = sum(job.weight.numel() for job in jobs)
    stored = coded_weights = done = 0
    by_task = {
        Task(job.weight.numel(), 0, partial(encode_weight, job.weight, job.config, job.names[0])): (
            job
        )
        for job in jobs
    }
    bar = tqdm(total=total, desc="encoding", unit="w", unit_scale=True, disable=not jobs)
    with bar, closing(run_tasks(by_task, None, bar.refresh)) as results:
        for task, coded in results:
            done += 1
            bar.update(task.weights)
            if coded is not None:
                stored += 8 * coded.stored_bytes
                coded_weights += coded.numel()
                bar.set_postfix_str(
                    f"{done}/{len(jobs)} layers, {stored / coded_weights:.3f} bits/weight"
                )
                _swap(by_task.pop(task).owners, coded)


def run_tasks(
    tasks: Iterable[Task[T]], max_memory: int | None, refresh: Callable[[], object]
) -> Generator[tuple[Task[T], T], None, None]:
    """Run tasks in parallel, in their order, and yield each with its result when it is done.

    To be closed (`contextlib.closing`) by who may leave before the end. An error, an interrupt or
    closing ends the encoders' programs and all that has not begun.

    Args:
        tasks: in the order in which they begin.
        max_memory: bytes that tasks that run together may take; one alone always runs. None for no
            limit.
        refresh: called once a second at least.
    """
    encoders = ThreadPoolExecutor(core_count(), thread_name_prefix="torchcodec_weights-encode")
    # A layer waits for its slowest tile, so one more than cores keeps them busy.
    count = core_count() + 1
    layers = ThreadPoolExecutor(count, thread_name_prefix="torchcodec_weights-layer")
    programs = ffmpeg.RunningPrograms()
    ours = copy_context()
    ours.run(ffmpeg.running.set, programs)
    running: dict[Future[T], Task[T]] = {}
    waiting = deque(tasks)
    try:
        while waiting or running:
            taken = sum(task.memory for task in running.values())
            while waiting and len(running) < count:
                memory = waiting[0].memory
                if running and max_memory is not None and taken + memory > max_memory:
                    break
                taken += memory
                task = waiting.popleft()
                running[layers.submit(ours.copy().run, task.run, encoders)] = task
            done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()
            refresh()
    except BaseException:
        for pool in (layers, encoders):
            pool.shutdown(wait=False, cancel_futures=True)
        programs.kill()
        raise
    layers.shutdown()
    encoders.shutdown()


def encode_weight(
    weight: torch.Tensor,
    config: CodecWeightOnlyConfig,
    name: str,
    encoders: ThreadPoolExecutor | None = None,
) -> CodecTensor | None:
    """Encode a weight; None, with a warning, if it is too small for the target."""
    try:
        return CodecTensor.from_hp(weight, config, encoders)
    except RateError as error:
        if weight.numel() < EXACT_WEIGHTS:
            warnings.warn(f"{name} stays dense: {error}", stacklevel=2)
            return None
        error.args = (f"{name}: {error}",)
        raise


def _swap(owners: list[tuple[nn.Module, str]], coded: CodecTensor) -> None:
    parameter = nn.Parameter(coded, requires_grad=False)
    for module, name in owners:
        setattr(module, name, parameter)
        if isinstance(module, nn.Linear) and _prints_as_linear(module):
            # Not a method: that would be pickled as an attribute, which the class does not have.
            module.extra_repr = partial(_linear_repr, module)  # type: ignore[method-assign]


def _prints_as_linear(module: nn.Module) -> bool:
    own = type(module).extra_repr is not nn.Linear.extra_repr or "extra_repr" in vars(module)
    return not own


def restore_repr(module: nn.Module) -> None:
    """Undo what `_swap` did to the `repr` of a module; others are left unchanged."""
    if getattr(vars(module).get("extra_repr"), "func", None) is _linear_repr:
        del module.extra_repr


def _linear_repr(self: nn.Linear) -> str:
    return f"{self.in_features}, {self.out_features}, weight={self.weight.data}"


_bars: dict[int, tqdm] = {}


def _sequential_progress(config: CodecWeightOnlyConfig) -> tqdm:
    """The progress bar of a call of torchao's own `quantize_`, without a total number of layers.

    It is closed when the configuration is freed, which such a call holds until it returns.
    """
    key = id(config)
    if key not in _bars:
        _bars[key] = tqdm(desc="encoding", unit=" layers")

        def close() -> None:
            _bars.pop(key).close()

        weakref.finalize(config, close)
    return _bars[key]
