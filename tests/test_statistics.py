"""What calibration measures: statistics of inputs and gradients, on text that a model writes."""

import copy
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel

from torchcodec_weights.calibration import accumulate
from torchcodec_weights.calibration.score import score
from torchcodec_weights.calibration.statistics import Statistics, collect_statistics
from torchcodec_weights.calibration.text import own_text
from torchcodec_weights.matrix.importance import Importance

# A process of its own, as one that tests ran in has memory to reuse. It prints the peaks of a plain
# forward and backward pass through all layers, without hooks, and of the statistics.
MEMORY = """
from pathlib import Path
import torch
from memory_of import status
from torchcodec_weights.calibration.score import score
from torchcodec_weights.calibration.statistics import collect_statistics
from torchcodec_weights.evaluation.models import load_smollm2

model, _ = load_smollm2()
model.requires_grad_(False)
examples = torch.randint(49152, (2, 128)).split(1)

def plain():
    for example in examples:
        embedded = model.get_input_embeddings()(example).requires_grad_()
        score(model(inputs_embeds=embedded)).backward()

def peak(function):
    Path("/proc/self/clear_refs").write_text("5")
    result = function()
    return status("VmHWM"), result

plain()
before = status("VmRSS")
activations, _ = peak(plain)
taken, statistics = peak(lambda: collect_statistics(model, sample_inputs=examples))
print(activations - before, taken - before, statistics._file._end)
"""


def tokens_of(count: int = 3, length: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(512, (count, length), generator=generator).split(1))


def close(found: NDArray[np.float32], expected: Any, tolerance: float = 2e-4) -> None:
    """Within a share of the largest: the sums are those of float32 in another order."""
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max() > 0


def explicit(
    model: nn.Module, name: str, examples: list[Any], score_of: Callable[[Any], Tensor] = score
) -> tuple[Tensor, Tensor]:
    """G and H of a Linear layer, one token after the other, its inputs and outputs kept whole.

    The score is differentiated by an addition of zeros to the layer's output. Labels are those
    that the seed draws.
    """
    module = model.get_submodule(name)
    rows, cols = module.weight.shape
    squares, moments, count = torch.zeros(rows).double(), torch.zeros(cols, cols).double(), 0
    torch.manual_seed(accumulate._SEED)
    for example in examples:
        seen = []

        def hook(module: nn.Module, args: Any, output: Tensor, seen: Any = seen) -> Tensor:
            added = torch.zeros_like(output, requires_grad=True)
            seen.append((args[0].detach(), added))
            return output + added

        handle = module.register_forward_hook(hook)
        value = score_of(model(example))
        handle.remove()
        for x, added in seen:
            (gradient,) = torch.autograd.grad(value, added, retain_graph=True)
            for vector, errors in zip(
                x.reshape(-1, cols).double(), gradient.reshape(-1, rows).double(), strict=True
            ):
                moments += torch.outer(vector, vector)
                squares += errors**2
                count += 1
    return squares, moments / count


def test_gradients_and_moments_of_a_language_model() -> None:
    model = tiny_llama().eval()
    examples = tokens_of()
    statistics = collect_statistics(model, sample_inputs=examples)
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        squares, moments = explicit(model, name, examples)
        importance = statistics[name]
        assert importance.rows.dtype == importance.moments.dtype == np.float32
        close(importance.rows, squares)
        close(importance.moments, moments)
        close(importance.columns, moments.diagonal())


def test_the_score_has_the_fisher_information_as_its_mean() -> None:
    """One token of a linear softmax model: the Fisher information is diag(p) − p pᵀ."""
    torch.manual_seed(0)
    model = Logits(nn.Linear(8, 5))
    x = torch.randn(1, 8)
    count = 20_000
    importance = collect_statistics(model, sample_inputs=[x.expand(count, 8)])["linear"]
    p = model(x).logits.softmax(-1)[0].detach()
    variance = p * (1 - p)  # of the gradient; its square has a fourth moment below p (1 − p)
    deviation = (variance / count).sqrt()
    assert (np.abs(importance.rows / count - variance.numpy()) < 5 * deviation.numpy()).all()


class Output(dict[str, Tensor]):
    """An output as transformers have it."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


class Logits(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Output:
        return Output(logits=self.linear(x))


class Net(nn.Module):
    """Two layers that may take the same input, one that none reaches, one of no effect."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.unreached, self.unused = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, *, same: bool = True, mask: Tensor | None = None) -> Tensor:
        x = x if mask is None else x * mask
        self.unused(x)
        return self.a(x).relu_() + 2 * self.b(input=x if same else x + 1)


def random_inputs(count: int = 3, tokens: int = 10, width: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(tokens, width, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
def test_outputs_without_logits(form: str) -> None:
    net, inputs = Net(), random_inputs()
    given = [{"tensor": x, "tuple": (x,), "mapping": {"x": x, "mask": None}}[form] for x in inputs]
    statistics = collect_statistics(net, sample_inputs=given)
    squares, moments = explicit(net, "a", inputs)
    close(statistics["a"].rows, squares)
    close(statistics["a"].moments, moments)
    # Signs are 1 or −1, and the output is twice that of b.
    close(statistics["b"].rows, np.full(16, 4.0 * 30))


def test_layers_without_an_input_or_a_gradient() -> None:
    statistics = collect_statistics(Net(), sample_inputs=random_inputs())
    assert list(statistics) == ["a", "b", "unreached", "unused"]
    assert statistics["unreached"] is statistics["unused"] is None
    with pytest.raises(KeyError):
        statistics["c"]


def places(statistics: Statistics) -> dict[str, Any]:
    return {name: sums and sums.moments for name, sums in statistics._sums.items()}


def test_layers_that_take_the_same_input_share_its_moments() -> None:
    statistics = collect_statistics(tiny_llama(), sample_inputs=tokens_of())
    where = places(statistics)
    layer = "model.layers.0."
    attention = {where[f"{layer}self_attn.{name}_proj"] for name in "qkv"}
    mlp = {where[f"{layer}mlp.{name}_proj"] for name in ("gate", "up")}
    assert len(attention) == len(mlp) == 1
    assert len(set(where.values())) == 8
    assert len(where) == 14


@pytest.mark.parametrize("same", [[True, False, True], [False, True, True], [True, True, True]])
def test_inputs_that_are_the_same_only_at_times(same: list[bool]) -> None:
    net, inputs = Net(), random_inputs()
    given = [{"x": x, "same": s} for x, s in zip(inputs, same, strict=True)]
    statistics = collect_statistics(net, sample_inputs=given)
    a = torch.cat(inputs)
    b = torch.cat([x if s else x + 1 for x, s in zip(inputs, same, strict=True)])
    close(statistics["a"].moments, a.T @ a / 30)
    close(statistics["b"].moments, b.T @ b / 30)
    assert (places(statistics)["a"] == places(statistics)["b"]) == all(same)


class Changing(nn.Module):
    """Layers that take one tensor, which is changed between them, or layer `b` twice."""

    def __init__(self, change: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.a(x)
        if self.change:
            return y + self.b(x.mul_(3))
        return y + self.b(x) + self.b(5 * x)


@pytest.mark.parametrize("change", [True, False])
def test_the_same_tensor_is_not_always_the_same_input(change: bool) -> None:
    inputs = random_inputs()
    x = torch.cat(inputs)
    statistics = collect_statistics(Changing(change), sample_inputs=inputs)
    close(statistics["a"].moments, x.T @ x / 30)
    close(statistics["b"].moments, x.T @ x / 30 * (9 if change else 13))


def test_a_shared_weight_adds_up() -> None:
    net, inputs = Net(), random_inputs()
    given = [{"x": x, "same": False} for x in inputs]
    apart = collect_statistics(net, sample_inputs=given)
    net.b.weight = net.a.weight
    net.b.bias = net.a.bias
    together = collect_statistics(net, sample_inputs=given)
    x = torch.cat([*inputs, *(x + 1 for x in inputs)])
    assert together["a"].rows is together["b"].rows
    close(together["a"].rows, apart["a"].rows + apart["b"].rows)
    close(together["b"].moments, x.T @ x / 60)


def test_a_head_tied_to_an_embedding_counts_alone() -> None:
    model, examples = tiny_llama().eval(), tokens_of()
    assert "lm_head" not in collect_statistics(model, sample_inputs=examples)

    def ends(module: nn.Module, name: str) -> bool:
        return name in ("lm_head", "model.embed_tokens")

    statistics = collect_statistics(model, ends, sample_inputs=examples)
    squares, moments = explicit(model, "lm_head", examples)
    assert list(statistics) == ["model.embed_tokens", "lm_head"]
    for importance in statistics.values():
        close(importance.rows, squares)
        close(importance.moments, moments)


class Pictures(nn.Module):
    """A convolution, a Linear layer with a forward of its own, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.doubled = Doubled(8, 6)
        self.embedding = nn.Embedding(10, 6)

    def forward(self, x: Tensor, token: Tensor) -> tuple[Tensor]:
        return (self.doubled(self.conv(x).mean((2, 3))) * self.embedding(token),)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_other_modules_by_the_gradient_of_their_weights() -> None:
    model = Pictures()
    inputs = [(torch.randn(2, 3, 5, 5), torch.tensor([i, 3])) for i in range(3)]
    statistics = collect_statistics(
        model, lambda module, name: hasattr(module, "weight"), sample_inputs=inputs
    )
    assert list(statistics) == ["conv", "doubled", "embedding"]
    fisher: dict[str, Any] = dict.fromkeys(statistics, 0)
    torch.manual_seed(accumulate._SEED)
    for example in inputs:
        weights = [model.get_submodule(name).weight for name in statistics]
        gradients = torch.autograd.grad(score(model(*example)), weights)
        for name, gradient in zip(statistics, gradients, strict=True):
            fisher[name] += gradient.flatten(1) ** 2
    for name, importance in statistics.items():
        close(importance.rows, fisher[name].sum(1))
        close(importance.moments, fisher[name].sum(0) / fisher[name].sum())
    assert statistics["conv"].moments.shape == (27,)
    assert not statistics["embedding"].rows[9], "a token that does not occur"


class Checkpointed(nn.Module):
    """Two layers that take one input; their forward pass may run again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, on: bool) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return (self.first(x).tanh() * self.second(x).tanh()).tanh()

        return checkpoint(inner, x, use_reentrant=False) if on else inner(x)


def test_a_checkpoint_counts_its_inputs_once() -> None:
    net, inputs = Checkpointed(), random_inputs()
    found = collect_statistics(net, sample_inputs=[(x, i == 1) for i, x in enumerate(inputs)])
    expected = collect_statistics(net, sample_inputs=[(x, False) for x in inputs])
    assert places(found) == places(expected)
    for name in ("first", "second"):
        close(found[name].rows, expected[name].rows, 1e-6)
        close(found[name].moments, expected[name].moments, 1e-6)


class Experts(nn.Module):
    """Layers of which an input reaches some."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, names: str) -> Tensor:
        return sum(self.get_submodule(name)(x) for name in names)


@pytest.mark.parametrize("names", [("a", "ab", "b"), ("a", "ab", "ab"), ("ab", "a", "ab")])
def test_layers_that_only_some_inputs_reach_together(names: tuple[str, ...]) -> None:
    inputs = random_inputs()
    given = [*zip(inputs, names, strict=True)]
    statistics = collect_statistics(Experts(), sample_inputs=given)
    for name in "ab":
        x = torch.cat([x for x, reached in given if name in reached])
        close(statistics[name].moments, x.T @ x / len(x))


class Tied(nn.Module):
    """A head that is defined before the embedding that it is tied to."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.embedding = nn.Linear(16, 8, bias=False), nn.Embedding(8, 16)
        self.embedding.weight = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def test_the_order_of_tied_modules_does_not_matter() -> None:
    statistics = collect_statistics(
        Tied(), lambda module, name: bool(name), sample_inputs=[torch.arange(8)]
    )
    assert list(statistics) == ["head", "embedding"]
    for importance in statistics.values():
        close(importance.rows, np.full(8, 8.0))  # signs, of eight tokens


def deviation(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class Deep(nn.Module):
    """Four layers, and a gain whose gradient float16 may not hold."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x * self.gain * self.gain


@pytest.mark.parametrize(
    ("dtype", "gain"),
    [
        (torch.bfloat16, 1.0),
        (torch.float16, 1.0),
        (torch.float16, 2.0**-11),  # gradients of 2^-22, half of which are zero in float16
        (torch.float16, 2.0**5),  # and of 2^10, which the scale of these must not make infinite
    ],
)
def test_half_precision(dtype: torch.dtype, gain: float) -> None:
    """Rounding to p bits changes a square by 2^(1 − p) at most.

    Some eight roundings, one after the other, lie between the input and a layer's gradient.
    """
    inputs = random_inputs(4, 64, 64)
    inputs = [x.bfloat16().half().float() for x in inputs]  # exact in all three
    expected = collect_statistics(Deep(gain), sample_inputs=inputs)
    halves = [x.to(dtype) for x in inputs]
    found = collect_statistics(Deep(gain).to(dtype), sample_inputs=halves)
    bits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    for name, importance in expected.items():
        assert deviation(found[name].rows, importance.rows) < 8 * 2.0 ** (1 - bits)
        assert deviation(found[name].moments, importance.moments) < 8 * 2.0 ** (1 - bits)
    assert np.isfinite(found["layers.0"].rows).all()


class Broken(nn.Module):
    """A layer whose output or gradient is made infinite."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.where == "between":
            x = x / 0
        if self.where == "gradient":
            x = (x * 0).sqrt()  # zero, with an infinite slope
        x = self.second(x)
        return x * torch.nan if self.where == "output" else x


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("input", "input 1: first: its input holds NaN or infinity: sample_inputs, or the model"),
        ("between", "input 0: second: its input holds NaN or infinity"),
        ("gradient", "first: the gradient of its output holds NaN or infinity at input 0"),
        ("output", "input 0: the model's output holds NaN or infinity"),
    ],
)
def test_values_that_are_not_finite(where: str, message: str) -> None:
    inputs = random_inputs()
    if where == "input":
        inputs[1][3, 5] = torch.nan
    with pytest.raises(ValueError, match=message):
        collect_statistics(Broken(where), sample_inputs=inputs)


def test_squares_beyond_float32() -> None:
    with pytest.raises(ValueError, match="unused: the squares of its inputs or gradients exceed"):
        collect_statistics(Net(), sample_inputs=[torch.full((2, 16), 1e25)])


def test_logits_that_are_not_finite() -> None:
    class Head(Logits):
        fill = -torch.inf  # a class that is ruled out

        def forward(self, x: Tensor) -> Output:
            return Output(logits=self.linear(x).index_fill(-1, torch.tensor(0), self.fill))

    head = Head(nn.Linear(16, 4))
    found = collect_statistics(head, sample_inputs=random_inputs())["linear"]
    assert found.rows[0] == 0 < found.rows[1:].min()
    head.fill = torch.nan
    with pytest.raises(ValueError, match="input 0: the model's logits hold NaN or infinity"):
        collect_statistics(head, sample_inputs=random_inputs())


def state_of(model: nn.Module) -> list[Any]:
    modules = [(m.training, len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()]
    parameters = [
        (p.requires_grad, p.grad, len(p._post_accumulate_grad_hooks or ()))
        for p in model.parameters()
    ]
    return [modules, parameters, torch.get_rng_state().tolist()]


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


class Interrupted(nn.Module):
    """Interrupted in the forward pass, or in the backward pass."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.a, self.b, self.embedding = nn.Linear(16, 16), nn.Linear(16, 16), nn.Embedding(3, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.embedding(torch.tensor(1))
        y = self.a(x) * self.b(x)
        if self.where == "forward":
            raise KeyboardInterrupt
        if self.where == "backward":
            y.register_hook(self._stop)
        return y

    def _stop(self, gradient: Tensor) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["", "forward", "backward"])
def test_the_model_and_the_random_state_are_left_as_they_were(where: str) -> None:
    net = Interrupted(where).train()
    net.b.eval()
    net.a.weight.requires_grad_(False)
    net.b.weight.grad = torch.ones(16, 16)
    net.embedding.weight.grad = torch.ones(3, 16)
    gc.collect()
    before, files = state_of(net), open_files()
    arguments = net, lambda module, name: hasattr(module, "weight")
    if where:
        with pytest.raises(KeyboardInterrupt):
            collect_statistics(*arguments, sample_inputs=random_inputs())
    else:
        assert collect_statistics(*arguments, sample_inputs=random_inputs())["embedding"]
    assert state_of(net) == before
    assert net.b.weight.grad.sum() == 256
    gc.collect()
    assert open_files() == files


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_within_a_mode_without_gradients(mode: Callable[[], Any]) -> None:
    expected = collect_statistics(Net(), sample_inputs=random_inputs())["a"]
    net = Net()
    with mode():
        found = collect_statistics(net, sample_inputs=random_inputs())["a"]
    assert np.array_equal(found.rows, expected.rows)
    assert np.array_equal(found.moments, expected.moments)


def test_hooks_of_others_come_after_ours() -> None:
    net, inputs = Net(), random_inputs()
    net.b.register_forward_hook(lambda module, args, output: 3 * output)
    statistics = collect_statistics(net, sample_inputs=inputs)
    close(statistics["b"].rows, np.full(16, 36.0 * 30))


def test_a_model_without_gradients_is_refused() -> None:
    class Frozen(Net):
        forward = torch.no_grad()(Net.forward)

    with pytest.raises(ValueError, match="input 0: no gradient leads from the model's output"):
        collect_statistics(Frozen(), sample_inputs=random_inputs())


class Text(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.linear, self.output = nn.Linear(16, 16), output

    def forward(self, x: Tensor) -> Any:
        self.linear(x)
        return self.output


def test_arguments_that_are_refused() -> None:
    net, inputs = Net(), random_inputs()
    for arguments, message in (
        ({"model": 3}, r"model=3: allowed: a torch\.nn\.Module"),
        ({"filter_fn": "a"}, "filter_fn='a': allowed: a function"),
        ({"sample_inputs": inputs[0]}, "sample_inputs=tensor.*allowed: a list of one input"),
        ({"sample_inputs": []}, r"sample_inputs=\[\]: allowed: a list of one input"),
        ({"filter_fn": lambda module, name: False}, "filter_fn selects no layer"),
        ({"filter_fn": lambda module, name: True}, "model is selected, a Net without a parameter"),
        ({"sample_inputs": None}, r"sample_inputs=None with Net: .*give sample_inputs"),
        ({"model": Text("yes")}, "input 0: the model returns str: allowed"),
        ({"model": Text(())}, "input 0: the model returns tuple: allowed"),
        ({"model": Text(torch.tensor(3))}, r"input 0: the model returns torch\.int64: allowed"),
    ):
        chosen: dict[str, Any] = {"model": net, "sample_inputs": inputs, **arguments}
        with pytest.raises(ValueError, match=message):
            collect_statistics(**chosen)
    with torch.no_grad():
        net.a.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"a\.weight: weight holds NaN"):
        collect_statistics(net, sample_inputs=inputs)


def test_importance_refuses_other_arrays() -> None:
    rows, moments = np.ones(3, np.float32), np.ones((4, 4), np.float32)
    assert Importance(rows, moments[0]).columns.shape == (4,)
    for arguments, message in (
        ((rows.astype(float), moments), "rows is float64"),
        ((moments, moments), r"rows is float32 \(4, 4\): allowed"),
        ((rows, moments[:2]), r"moments is float32 \(2, 4\): allowed"),
        ((rows, rows[:0]), r"moments is float32 \(0,\): allowed"),
        ((rows, moments[None]), r"moments is float32 \(1, 4, 4\): allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            Importance(*arguments)


def equal(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, importance in expected.items():
        if importance is None:
            assert found[name] is None
        else:
            assert np.array_equal(found[name].rows, importance.rows)
            assert np.array_equal(found[name].moments, importance.moments)


def saved(path: Path) -> Statistics:
    net = Net()
    net.conv = nn.Conv1d(1, 3, 2)
    net.tied = nn.Linear(16, 16)
    net.tied.weight = net.a.weight
    statistics = collect_statistics(
        net, lambda module, name: hasattr(module, "weight"), sample_inputs=random_inputs()
    )
    statistics.save(path)
    return statistics


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "file"
    expected = saved(path)
    found = Statistics.load(str(path))
    equal(found, expected)
    assert found["a"].rows is found["tied"].rows
    found.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert path.stat().st_size < 1.5 * (4 * 16 * 16) + 2048, "shared moments are stored once"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "file"]
    # Others can read it, and values outlive their object.
    assert np.array_equal(load_file(path)["b.rows"], expected["b"].rows)
    moments, kept = expected["a"].moments, expected["a"].moments.copy()
    del expected
    gc.collect()
    assert np.array_equal(moments, kept)
    with pytest.raises(ValueError, match="read-only"):
        moments[0, 0] = 1


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    statistics = saved(tmp_path / "file")
    statistics._file.close()
    with pytest.raises(ValueError, match="closed"):
        statistics.save(tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def rewritten(path: Path, **changes: Any) -> None:
    """Change tensors of a file, or its table."""
    tensors = load_file(path)
    with safe_open(path, "numpy") as file:
        table = file.metadata()["importance"]
    table = changes.pop("table", table)
    for name, value in changes.items():
        tensors[name.replace("__", ".")] = value
    tensors = {name: value for name, value in tensors.items() if value is not None}
    save_file(tensors, path, {"importance": table if isinstance(table, str) else json.dumps(table)})


ONES = np.ones((16, 16), np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": "{"}, "'importance' in its table of strings is no JSON"),
        ({"table": "[" * 100_000}, "'importance' in its table of strings is no JSON"),
        ({"table": [1]}, "'importance' in its table of strings is no table"),
        ({"table": {"a": 3}}, "layer 'a' has 3 for names of two tensors"),
        ({"table": {"a": ["a.rows"]}}, "layer 'a' has .* for names of two tensors"),
        ({"table": {"a": [{}, []]}}, r"layer 'a' names a tensor {} that is not there"),
        ({"table": {"a": ["a.rows", "a.moments"]}}, "the tensor 'b.rows' belongs to no layer"),
        ({"b__rows": None}, r"layer 'b' names a tensor 'b\.rows' that is not there"),
        ({"x": ONES}, "the tensor 'x' belongs to no layer"),
        ({"b__rows": ONES[0].astype(np.float16)}, r"the tensor 'b\.rows' is F16: allowed: F32"),
        ({"b__rows": ONES}, r"the tensor 'b\.rows' has the shape \(16, 16\): allowed: \(rows,\)"),
        ({"b__rows": ONES[0, :0]}, r"the tensor 'b\.rows' has the shape \(0,\)"),
        ({"b__rows": -ONES[0]}, r"the tensor 'b\.rows' holds values that are negative"),
        ({"b__rows": np.nan * ONES[0]}, r"the tensor 'b\.rows' holds values that are negative or"),
        ({"a__moments": ONES[:3]}, r"the tensor 'a\.moments' has the shape \(3, 16\)"),
    ],
)
def test_files_that_lie(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "file"
    saved(path)
    rewritten(path, **changes)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        Statistics.load(path)


def test_moments_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "file"
    saved(path)
    for value in (np.nan * ONES, -ONES):
        rewritten(path, a__moments=value)
        found = Statistics.load(path)
        assert found["conv"] is None
        with pytest.raises(ValueError, match=f"^{path}: moments of 'a' that are not finite"):
            found["a"]


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    statistics = saved(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 7, 8, header - 1, header, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"^{path}: not a safetensors file"):
            Statistics.load(path)
    save_file({"x": ONES}, path)
    with pytest.raises(ValueError, match=f"^{path}: a safetensors file without 'importance'"):
        Statistics.load(path)
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[random.integers(header)] = random.integers(256)
        path.write_bytes(damaged)
        with suppress(ValueError):  # whatever else is raised fails
            Statistics.load(path)
    with pytest.raises(FileNotFoundError):
        Statistics.load(tmp_path / "none")
    statistics.save(path)
    equal(Statistics.load(path), statistics)


def test_check(tmp_path: Path) -> None:
    saved(tmp_path / "file")
    statistics = Statistics.load(tmp_path / "file")
    weights = {"a": torch.ones(16, 16), "unreached": torch.ones(3, 3)}
    statistics.check(weights)
    with pytest.raises(ValueError, match=r"file: nothing about 'c': allowed: statistics of this"):
        statistics.check({**weights, "c": torch.ones(3, 3)})
    with pytest.raises(ValueError, match=r"'b' is a matrix of \(16, 16\), and the model's of \(16"):
        statistics.check({"b": torch.ones(16, 5, 3)})


def test_text_of_a_language_model() -> None:
    model = tiny_llama().train()
    model.generation_config.update(max_length=5, temperature=0.1, top_k=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[2] += 0.3 * model.model.norm.weight  # EOS is often likely
    defaults = copy.deepcopy(vars(model.generation_config))
    before = state_of(model)
    text = own_text(model, 5)
    assert state_of(model) == before
    assert vars(model.generation_config) == defaults
    assert text.shape == (5, 64), "the model takes 64"
    assert text.dtype == torch.int64
    assert (text[:, 0] == 1).all()
    assert (text != 2).all()
    assert torch.equal(own_text(model, 5), text)
    assert not torch.equal(own_text(model, 5, seed=1), text)
    assert len(text.unique(dim=0)) == 5
    assert own_text(model, 2, 10).shape == (2, 10)


def test_text_has_the_probabilities_of_the_model() -> None:
    """Second tokens, all after the same first: 20,000 draws among 8 tokens but EOS."""
    model = tiny_llama(vocab_size=8, max_position_embeddings=2, initializer_range=0.2).eval()
    model.generation_config.update(suppress_tokens=[3], repetition_penalty=3.0)
    text = own_text(model, 20_000)
    with torch.no_grad():
        logits = model(torch.tensor([[1]])).logits[0, 0]
    logits[2] = -torch.inf
    p = logits.softmax(-1).numpy()
    assert p.max() / p[p > 0].min() > 1.5
    found = np.bincount(text[:, 1], minlength=8) / 20_000
    assert (np.abs(found - p) <= 5 * np.sqrt(p * (1 - p) / 20_000)).all()


def test_text_without_a_first_token_begins_with_random_ones() -> None:
    model = tiny_llama(bos_token_id=None)
    model.generation_config.bos_token_id = None
    assert len(own_text(model, 8)[:, 0].unique()) > 3


def test_models_that_write_no_text() -> None:
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    with pytest.raises(ValueError, match=r"sample_inputs=None with BertModel: .*give sample_in"):
        collect_statistics(BertModel(config))
    with pytest.raises(ValueError, match="count=0: allowed: an integer above 0"):
        own_text(tiny_llama(), 0)
    with pytest.raises(ValueError, match="length=0: allowed: an integer above 0"):
        own_text(tiny_llama(), 1, 0)


def test_an_encoder_with_inputs() -> None:
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    ids = torch.tensor([[1, 2, 3]])
    inputs = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    statistics = collect_statistics(BertModel(config), sample_inputs=inputs)
    assert statistics["pooler.dense"] is None, "the first value is the last hidden state"
    assert sum(importance is not None for importance in statistics.values()) == 12


def test_statistics_of_text_that_the_model_writes() -> None:
    model = tiny_llama()
    own = collect_statistics(model)
    equal(own, collect_statistics(model, sample_inputs=own_text(model).split(1)))


@pytest.mark.slow
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs"
)
def test_memory_of_a_real_model() -> None:
    """Two examples of 128 tokens: the activations of one, and one layer's moments.

    The largest are 9 MiB, 1536 × 1536. Those of all layers take 384 MiB, and gradients of all
    weights 405. Allowed beyond the activations: three of the largest, as a product may need
    another copy. glibc gives each buffer above 64 KiB back to the system when it is freed; without
    that, what one of the two leaves to the other differs by more than 100 MiB from run to run.
    """
    result = subprocess.run(
        [sys.executable, "-c", MEMORY],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
        env=os.environ
        | {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)},
    )
    activations, taken, stored = map(int, result.stdout.split())
    print(f"{activations / 2**20:.0f} {taken / 2**20:.0f} {stored / 2**20:.0f} MiB")
    assert stored == 30 * 4 * (3 * 576**2 + 1536**2)
    assert activations > 128 * 2**20  # else the allocator served them from what was left
    assert taken - activations < 3 * 4 * 1536**2
