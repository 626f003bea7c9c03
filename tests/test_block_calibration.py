"""Calibration with one block of a model in memory at a time: as in memory, after kills too."""

import multiprocessing
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from test_cli import WORDS, tokenizer
from test_stream import by_torchrun, digest, same_weights, status, work
from torch import Tensor, nn
from torchao.quantization import FqnToConfig
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from torchcodec_weights import CodecTensor, calibrate, codec_weight_only, quantize_
from torchcodec_weights.calibration.blocks import Blocks, NotByBlocksError
from torchcodec_weights.calibration.blockwise import BlockwiseModel
from torchcodec_weights.calibration.read_text import inputs_of_text
from torchcodec_weights.calibration.statistics import collect_statistics
from torchcodec_weights.cli import compress, main
from torchcodec_weights.convert import calibration
from torchcodec_weights.convert.calibration import BlockCalibration
from torchcodec_weights.convert.plan import Choice, make_plan, read_file
from torchcodec_weights.convert.source import open_source
from torchcodec_weights.format.safetensors import read_header
from torchcodec_weights.models.checkpoint import load_folder
from torchcodec_weights.models.huggingface import load_model, weight_names

pytestmark = pytest.mark.filterwarnings("ignore:Config Deprecation")

CONFIG = codec_weight_only("ectcq", bits=3, preset="fast")
INCLUDED = "_proj|embed_tokens|lm_head"  # the embedding, which is tied, is calibrated too
SMALL: dict[str, Any] = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}


def llama() -> Any:
    return tiny_llama(hidden_size=256, intermediate_size=512, num_hidden_layers=3)


def gpt2() -> Any:
    """Conv1D in place of Linear: judged by the gradients of weights."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=2, n_head=4, n_positions=48, **SMALL))


def gemma() -> Any:
    """Blocks of two kinds, with masks and positions of their own; an embedding tied to the head."""
    torch.manual_seed(0)
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            sliding_window=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=48,
            **SMALL,
        )
    )


def saved(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    model.to(dtype).save_pretrained(folder / "model", max_shard_size="1MB")
    return folder / "model"


@pytest.mark.parametrize(
    ("build", "dtype", "choice"),
    [
        (llama, torch.bfloat16, Choice(CONFIG)),
        (gpt2, torch.float32, Choice(CONFIG, include=r"h\.\d|wte")),
        (gemma, torch.float32, Choice(CONFIG, embeddings=CONFIG)),
    ],
)
def test_statistics_are_those_of_the_whole_model(
    build: Callable[[], Any],
    dtype: torch.dtype,
    choice: Choice,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = open_source(str(saved(build(), tmp_path, dtype)))
    assert source.place is not None
    files = [read_file(source, name) for name in source.weight_files(source.place)]
    plan = make_plan(source, files, source.place, choice)
    model = load_model(source.place)
    names = choice.calibrated(model)
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(512, (1, n), generator=generator) for n in (32, 48, 32)]
    inputs = [{"input_ids": row} for row in tokens]
    monkeypatch.setattr(BlockCalibration, "_inputs", lambda *_: inputs)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def keep(self: Any, part: Any, statistics: Any) -> None:
        for name, importance in statistics.items():
            found[name] = importance.rows, np.array(importance.moments)

    monkeypatch.setattr(BlockCalibration, "_keep", keep)
    monkeypatch.setattr(BlockCalibration, "_read", lambda *_: {})
    BlockCalibration(source, plan, choice, tmp_path / "work", None).collect()
    expected = collect_statistics(model, lambda m, n: f"{n}.weight" in names, sample_inputs=inputs)
    tied = {"transformer.wte", "model.embed_tokens"} & expected.keys()
    assert found.keys() == expected.keys() - (tied if build is gemma else set())
    assert len(found) >= 8
    for name, (rows, moments) in found.items():
        importance = expected[name]
        assert importance is not None
        for mine, whole in ((rows, importance.rows), (moments, importance.moments)):
            assert np.abs(mine - whole).max() <= 1e-5 * np.abs(whole).max() > 0, name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers in bfloat16, in several files, with a tokenizer."""
    folder = saved(llama(), tmp_path_factory.mktemp("llama"), torch.bfloat16)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def options(folder: Path) -> list[str]:
    """Calibration on three sequences of 64 tokens or fewer."""
    text = folder.parent / "text.txt"
    text.write_text(" ".join(WORDS * 9)[:700])
    return ["--bits", "3", "--preset", "fast", "--include", INCLUDED, "--calibrate", str(text)]


@pytest.fixture(scope="module")
def whole(folder: Path, options: list[str]) -> Path:
    """What `compress` makes of it."""
    out = folder.parent / "whole"
    assert status("compress", folder, out, *options) == 0
    assert not work(out).exists()
    return out


def test_the_same_bytes_as_in_memory(folder: Path, options: list[str], whole: Path) -> None:
    model = load_model(folder)
    names = weight_names(model, INCLUDED)
    inputs = inputs_of_text(Path(options[-1]).read_text(), tokenizer(), model)
    assert len(inputs) == 3
    plan = calibrate(
        model, CONFIG, lambda module, name: f"{name}.weight" in names, sample_inputs=inputs
    )
    configs = dict.fromkeys(names, CONFIG)
    configs.update({f"{name}.weight": found for name, found in plan.fqn_to_config.items()})
    quantize_(model, FqnToConfig(configs))
    expected = model.state_dict()
    expected.pop("lm_head.weight")  # tied
    assert sum(isinstance(weight, CodecTensor) for weight in expected.values()) == 22
    same_weights(load_folder(whole), expected)


def test_a_killed_run_goes_on_with_the_next_block(
    folder: Path,
    options: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed once in the forward pass, in the backward pass, and between blocks' encoding."""
    out = tmp_path / "out"
    calls: dict[str, list[Any]] = {}
    # At the second input of the second block; at the third part, the second block.
    last = {"_output": 5, "_statistics": 3, "moments": 3}

    def watch(stage: str) -> None:
        run = getattr(BlockwiseModel, stage)

        def interrupted(self: Any, *args: Any) -> Any:
            seen = calls.setdefault(stage, [])
            seen.append(args[0])
            if len(seen) == last[stage]:
                raise KeyboardInterrupt
            return run(self, *args)

        monkeypatch.setattr(BlockwiseModel, stage, interrupted)

    for stage in last:
        watch(stage)
    for _ in last:
        assert status("compress", folder, out, *options) == 130
    assert status("compress", folder, out, *options) == 0
    assert calls["_output"][:11] == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
    backward = [part.number for part in calls["_statistics"]]
    assert backward == [3, 2, 1, 1, 0]
    assert [part.number for part in calls["moments"]] == [0, 1, 2, 2, 3]
    assert digest(out) == digest(whole)


# What is on the disk when a run is killed, in the order in which it comes.
MOMENTS = (
    "out",
    ".out.unfinished/calibration/inputs.json",
    ".out.unfinished/calibration/states-0001",  # the first block's, in the forward pass
    ".out.unfinished/calibration/states-0003",
    ".out.unfinished/calibration/head.safetensors",  # the first of the backward pass
    ".out.unfinished/calibration/model.layers.1.safetensors",
    ".out.unfinished/parts/*",
    ".out.unfinished/done/*",
)


FINISHED = ("calibration", "parts", "done", "new")


def finished_files(out: Path) -> dict[str, tuple[int, int]]:
    """What is finished in the working directory: names to inodes and times of the last change."""
    root = work(out)
    found = {}
    for path in (path for name in FINISHED for path in (root / name).glob("*")):
        with suppress(FileNotFoundError):
            if path.suffix != ".tmp":
                state = path.stat()
                found[str(path.relative_to(root))] = state.st_ino, state.st_mtime_ns
    return found


def test_sigkill_at_any_stage(
    folder: Path, options: list[str], whole: Path, tmp_path: Path, capfd: Any
) -> None:
    """In processes of a server that has imported all, as that takes longer than the work."""
    out = tmp_path / "out"
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([main.__module__, LlamaForCausalLM.__module__])
    arguments = ["compress", str(folder), str(out), *options, "--max-memory", "2 GiB"]
    before: dict[str, tuple[int, int]] = {}
    for moment in MOMENTS:
        process = server.Process(target=main, args=(arguments,))
        process.start()
        while process.is_alive() and not any(
            path.suffix != ".tmp" for path in tmp_path.glob(moment)
        ):
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        now = finished_files(out)
        assert {name: now[name] for name in before.keys() & now.keys()}.items() <= before.items()
        kept = {name for name in before if name.endswith((".json", ".safetensors"))}
        assert kept <= now.keys()
        before = now
    process = server.Process(target=main, args=(arguments,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert digest(out) == digest(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "killed" not in capfd.readouterr().err


def test_a_lost_tensor_is_encoded_again(
    folder: Path,
    options: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a block whose hidden states were removed, as it was finished."""
    out, moments = tmp_path / "out", BlockwiseModel.moments

    def interrupted(self: Any, part: Any, file: Any) -> Any:
        if part.number == 2:
            raise KeyboardInterrupt
        return moments(self, part, file)

    monkeypatch.setattr(BlockwiseModel, "moments", interrupted)
    assert status("compress", folder, out, *options) == 130
    monkeypatch.undo()
    assert not (work(out) / "calibration" / "states-0001").exists()
    parts = (work(out) / "parts").iterdir()
    block = "model.layers.1."
    next(path for path in parts if min(read_header(path).tensors).startswith(block)).unlink()
    assert status("compress", folder, out, *options) == 0
    assert digest(out) == digest(whole)


def test_workers_share_blocks(
    folder: Path, options: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first finds the statistics, the second uses them, and runs its own blocks alone."""
    out, statistics, moments = tmp_path / "out", BlockwiseModel._statistics, BlockwiseModel.moments
    calls: list[tuple[str, int]] = []

    def tried(self: Any, part: Any, file: Any) -> Any:
        calls.append(("statistics", part.number))
        return statistics(self, part, file)

    def tried_again(self: Any, part: Any, file: Any) -> Any:
        calls.append(("moments", part.number))
        return moments(self, part, file)

    monkeypatch.setattr(BlockwiseModel, "_statistics", tried)
    monkeypatch.setattr(BlockwiseModel, "moments", tried_again)
    assert status("compress", folder, out, *options, "--worker", "1/2") == 0
    assert calls[:4] == [("statistics", number) for number in (3, 2, 1, 0)]
    first = len(calls)
    assert status("compress", folder, out, *options, "--worker", "0/2") == 0
    again = [number for _, number in calls[4:]]
    assert sorted(again) == [0, 1, 2, 3]
    assert 4 < first < len(calls) == 8
    assert status("compress", folder, out, *options) == 0
    assert len(calls) == 8
    assert digest(out) == digest(whole)


def test_torchrun(folder: Path, options: list[str], whole: Path, tmp_path: Path) -> None:
    """Two processes at one time, with the threads of this one, as sums depend on their number."""
    out = tmp_path / "out"
    threads = str(torch.get_num_threads())
    printed = by_torchrun(folder, out, *options, timeout=300, OMP_NUM_THREADS=threads)
    assert printed.count("22 weights") == 1
    assert digest(out) == digest(whole)


def test_workers_need_blocks(
    folder: Path,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    def refuse(*args: Any) -> None:
        raise NotByBlocksError("it is of another kind")

    monkeypatch.setattr(Blocks, "calls", refuse)
    assert status("compress", folder, tmp_path / "out", *options, "--worker", "0/2") == 2
    message = "it is of another kind: allowed for this model: one process, without --worker"
    assert message in capsys.readouterr().err
    with pytest.warns(UserWarning, match="so all of it is loaded now"):
        assert status("compress", folder, tmp_path / "out", *options) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class Row(nn.Module):
    """Blocks that are called in some way."""

    def __init__(
        self, call: Callable[[Any, Tensor], Tensor] | None, block: type[nn.Module]
    ) -> None:
        super().__init__()
        self.call = call
        if call is not None:
            self.blocks = nn.ModuleList([block(), block()])

    def forward(self, x: Tensor) -> Tensor:
        return x if self.call is None else self.call(self.blocks, x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, other: Any = None) -> Any:
        return self.linear(x)


class Pair(Block):
    def forward(self, x: Tensor, other: Any = None) -> Any:
        return self.linear(x), x


class Wider(Block):
    def forward(self, x: Tensor, other: Any = None) -> Any:
        return torch.cat([x, x])


def between(blocks: Any, x: Tensor) -> Tensor:
    return blocks[1](blocks[0](x) + 1)


def extra(blocks: Any, x: Tensor) -> Tensor:
    first = blocks[0](x)
    return blocks[1](first, 2 * first)


def table(blocks: Any, x: Tensor) -> Tensor:
    shared: dict[str, Tensor] = {}
    return blocks[1](blocks[0](x, shared), shared)


def twice(blocks: Any, x: Tensor) -> Tensor:
    for _ in range(2):
        for block in blocks:
            x = block(x)
    return x


def backwards(blocks: Any, x: Tensor) -> Tensor:
    return blocks[0](blocks[1](x))


def once(blocks: Any, x: Tensor) -> Tensor:
    return blocks[1](blocks[0](x))


def only_first(blocks: Any, x: Tensor) -> Tensor:
    return blocks[0](x)


@pytest.mark.parametrize(
    ("call", "block", "reason"),
    [
        (None, Block, "Row has no list of blocks"),
        (between, Block, r"changes what blocks\.0 returns before blocks\.1 takes it"),
        (extra, Block, r"blocks\.1 takes 1, which depends on blocks before it"),
        (table, Block, r"blocks\.0 takes 1, dict, which may pass on state"),
        (twice, Block, r"blocks\.0 is not called once, in its turn"),
        (backwards, Block, r"blocks\.1 is not called once, in its turn"),
        (only_first, Block, r"blocks\.1 is not called"),
        (once, Pair, "returns more than hidden states"),
        (once, Wider, r"blocks\.0 makes .* of"),
    ],
)
def test_what_cannot_be_run_by_blocks(call: Any, block: type[nn.Module], reason: str) -> None:
    model, x = Row(call, block), torch.randn(2, 4)
    with pytest.raises(NotByBlocksError, match=reason):
        run_by_blocks(model, x)


def run_by_blocks(model: nn.Module, x: Tensor) -> Tensor:
    blocks = Blocks(model)
    blocks.try_first(x)
    hidden, calls = blocks.calls(x)
    for number, call in enumerate(calls):
        hidden = blocks.run(number, call, hidden)
    result: Tensor = blocks.after(x, hidden)
    return result


def test_what_can_be_run_by_blocks() -> None:
    model, x = Row(once, Block), torch.randn(2, 4)
    assert torch.equal(run_by_blocks(model, x), model(x))


@pytest.mark.parametrize("fits", [True, False])
def test_other_models_go_on_without(
    folder: Path, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    """In memory if they fit, and else without calibration."""

    def refuse(*args: Any) -> None:
        raise NotByBlocksError("it is of another kind")

    monkeypatch.setattr(Blocks, "calls", refuse)
    monkeypatch.setattr(compress, "fits_in_memory", lambda *_: fits)
    with pytest.warns(UserWarning, match="block by block: it is of another kind; so"):
        assert status("compress", folder, tmp_path / "out", *options) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    weights = load_folder(tmp_path / "out").values()
    orders = {weight.header.order for weight in weights if isinstance(weight, CodecTensor)}
    assert orders == ({0, 1} if fits else {0})


def test_a_source_that_was_written_to_is_tried_again(
    folder: Path, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, out, keep = tmp_path / "copy", tmp_path / "out", BlockCalibration._keep
    shutil.copytree(folder, copy)
    parts: list[Any] = []

    def interrupted(self: Any, part: Any, statistics: Any) -> None:
        parts.append(part)
        keep(self, part, statistics)
        if len(parts) % 2 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(BlockCalibration, "_keep", interrupted)
    assert status("compress", copy, out, *options) == 130
    next(copy.glob("*.safetensors")).touch()
    assert status("compress", copy, out, *options) == 130
    assert parts[:2] == parts[2:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"--calibrate=self: to write text .* of 1\.0: allowed .* the path of a text file"),
        (["--max-memory", "1 MiB"], r"--max-memory=0\.00 GiB: allowed: "),
        (["--delete-source"], "--delete-source: allowed without --calibrate"),
    ],
)
def test_refused_before_any_work(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(calibration, "available", lambda: 2**30)
    options = ["--bits", "3", "--calibrate", "self", *arguments]
    assert status("compress", folder, tmp_path / "out", *options) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
