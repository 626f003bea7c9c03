"""The command line: what it writes opens elsewhere, and what it cannot do it says."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import VIDEO, fastest, snr_db, tiny_llama
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)

from torchcodec_weights import CodecError, CodecTensor, codec_weight_only, load_file, save_file
from torchcodec_weights.cli import codecs, compress, main, sweep
from torchcodec_weights.codecs.names import codec_names
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.convert import run
from torchcodec_weights.convert.plan import NamesDifferError
from torchcodec_weights.evaluation.data import STS_BENCHMARK, data_file
from torchcodec_weights.evaluation.models import load_minilm
from torchcodec_weights.evaluation.sts import SentencePairs, load_sts, spearman, sts_spearman
from torchcodec_weights.format.container import read_tile
from torchcodec_weights.models.checkpoint import load_folder
from torchcodec_weights.models.report import report_tensors
from torchcodec_weights.system.files import unfinished

pytestmark = pytest.mark.filterwarnings("ignore:Config Deprecation")

UP = "model.layers.1.mlp.up_proj.weight"
FAST = ["--preset", "fast"]
WORDS = [f"w{index}" for index in range(3, 512)]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with tied embeddings in several files, a tokenizer and a file of its own."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_llama().save_pretrained(folder, max_shard_size="500KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    tokenizer().save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def compressed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after `compress` at 5 bits."""
    folder = tmp_path_factory.mktemp("compressed") / "llama"
    assert (
        main(["compress", str(llama), str(folder), "--bits", "5", *FAST, "--embeddings", "dense"])
        == 0
    )
    return folder


@pytest.fixture
def matrices(tmp_path: Path) -> Path:
    """A safetensors file of two matrices, a vector and integers."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "matrices.safetensors"
    tensors = {
        "weight": torch.randn(256, 128, generator=generator),
        "half.weight": torch.randn(128, 256, generator=generator).half(),
        "bias": torch.randn(256, generator=generator),
        "counts": torch.arange(12).reshape(3, 4),
    }
    safetensors.torch.save_file(tensors, path, {"format": "pt", "license": "none"})
    return path


def status(*arguments: Any) -> int:
    """Exit status of the program."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as error:
        return int(error.code or 0)


def coded_names(tensors: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in tensors.items() if isinstance(tensor, CodecTensor)}


def linear_names() -> set[str]:
    parts = [f"self_attn.{part}_proj" for part in "qkvo"]
    parts += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    return {f"model.layers.{layer}.{part}.weight" for layer in (0, 1) for part in parts}


def test_codecs(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("codecs") == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["codec", *codec_names()]
    assert status("codecs", "--json") == 0
    infos = {info["name"]: info for info in json.loads(capsys.readouterr().out)}
    assert not infos["lossless"]["lossy"]
    assert "cpu" in infos["hevc"]["decoders"]


def test_module_is_a_program() -> None:
    command = [sys.executable, "-m", "torchcodec_weights.cli", "compress", "nowhere", "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "exactly one must be given" in done.stderr
    assert "Traceback" not in done.stderr


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed program, which then prints what was imported that takes seconds."""
    script = """
import sys
from torchcodec_weights_cli import main
try:
    sys.exit(main())
finally:
    print(sorted({"torch", "torchao"} & sys.modules.keys()), file=sys.stderr)
"""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--help"], 0, "encode the weights of a model"),
        (["compress", "--help"], 0, "lossless"),
        (["sweep", "--help"], 0, "smollm2"),
        ([], 2, "arguments are required: COMMAND"),
        (["compress", "MODEL", "OUT", "--codec", "mpeg"], 2, "invalid choice: 'mpeg'"),
        (["compress", "MODEL", "OUT", "--embeddings", "nan"], 2, "--embeddings: 'nan': allowed"),
        (["sweep", "--models", "x", "--codecs", "mpeg", "--out", "o"], 2, "'mpeg': allowed"),
    ],
)
def test_arguments_are_read_without_pytorch(arguments: list[str], code: int, message: str) -> None:
    done = program(*arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stdout + done.stderr
    assert done.stderr.endswith("[]\n")


def test_the_program_runs_a_command() -> None:
    done = program("codecs", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("['torch', 'torchao']\n")
    assert [info["name"] for info in json.loads(done.stdout)] == codec_names()


def test_inspect_without_pytorch(
    compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says the same without PyTorch, which it imports where tensors are needed."""
    file = next(compressed.glob("*.safetensors"))
    report = report_tensors(load_folder(compressed).items())
    for arguments in ([compressed], [compressed, "--json"], [file, "--allow-codecs", "ectcq"]):
        done = program("inspect", *map(str, arguments))
        assert done.returncode == 0
        assert done.stderr == "[]\n"
        assert status("inspect", *arguments) == 0
        assert done.stdout == capsys.readouterr().out
        if "--allow-codecs" not in arguments:
            assert done.stdout == f"{report.to_json() if '--json' in arguments else report}\n"
    torch.save({"weight": load_folder(compressed)[UP]}, state := tmp_path / "state.pt")
    done = program("inspect", str(state))
    assert done.returncode == 0, done.stderr
    assert "1 weights:" in done.stdout
    assert done.stderr.endswith("['torch', 'torchao']\n")
    done = program("inspect", str(compressed), "--allow-codecs", "jpeg")
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "encoded with the codec 'ectcq', by which files may not be decoded" in done.stderr
    assert done.stderr.endswith("[]\n")


def test_inspect_extracts_by_the_program(compressed: Path, tmp_path: Path) -> None:
    tile = tmp_path / "tile.ectcq"
    done = program("inspect", str(compressed), "--extract-tile", UP, "0", str(tile))
    assert done.returncode == 0, done.stderr
    assert tile.stat().st_size > 0
    done = program("inspect", "nowhere")
    assert done.returncode == 2
    assert "FILE_OR_DIR='nowhere': allowed" in done.stderr


def test_compressed_directory_opens_with_transformers(llama: Path, compressed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    found = dict(model.named_parameters(remove_duplicate=False))
    assert coded_names({n: p.data for n, p in found.items()}) == linear_names()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = AutoTokenizer.from_pretrained(compressed)("w5 w7 w300", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(llama)(ids).logits
        assert snr_db(expected, model(ids).logits) > 20
    assert (compressed / "1_Pooling" / "config.json").exists()
    assert not list(compressed.parent.glob(".*"))


def test_choice_of_weights(llama: Path, tmp_path: Path) -> None:
    options = ["--bits", "6", *FAST]
    out = tmp_path / "some"
    assert status("compress", llama, out, *options, "--exclude", r"layers\.0|mlp|embed|head") == 0
    attention = {name for name in linear_names() if "layers.1.self_attn" in name}
    assert coded_names(load_folder(out)) == attention
    out = tmp_path / "embeddings"
    assert (
        status("compress", llama, out, *options, "--embeddings", "6", "--include", "up_proj") == 0
    )
    expected = {name for name in linear_names() if "up_proj" in name}
    assert coded_names(load_folder(out)) == expected | {"model.embed_tokens.weight"}
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model.lm_head.weight, CodecTensor)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_compress_calibrates(tmp_path: Path) -> None:
    llama = tmp_path / "llama"
    tiny_llama(hidden_size=256, intermediate_size=512).save_pretrained(llama)
    tokenizer().save_pretrained(llama)
    options = ("--bits", "3", *FAST)
    (tmp_path / "text.txt").write_text(" ".join(WORDS * 4) + "\n")
    rates = {}
    for text in ("self", str(tmp_path / "text.txt")):
        out = tmp_path / f"coded{len(rates)}"
        assert status("compress", llama, out, *options, "--calibrate", text) == 0
        weights = load_folder(out)
        embedding = weights.pop("model.embed_tokens.weight")
        assert 5.5 < embedding.bits_per_weight <= 6
        coded = {n: w for n, w in weights.items() if isinstance(w, CodecTensor)}
        rates[text] = {name: weight.bits_per_weight for name, weight in coded.items()}
        count = sum(weight.numel() for weight in coded.values())
        assert sum(8 * w.stored_bytes for w in coded.values()) / count <= 3
        assert coded[UP].header.order == 1
    assert len(set(rates["self"].values())) > 3
    assert rates["self"] != rates[str(tmp_path / "text.txt")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "3", "--calibrate", "nowhere.txt"], "allowed: self, or the path of a text"),
        (["--step", "1", "--calibrate", "self"], "--calibrate: allowed with --bits"),
    ],
)
def test_compress_refuses_to_calibrate(
    options: list[str], message: str, llama: Path, tmp_path: Path, capsys: Any
) -> None:
    assert status("compress", llama, tmp_path / "coded", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "coded").exists()


def test_decompressed_directory_is_dense(compressed: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense"
    assert status("decompress", compressed, out) == 0
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    dense = safetensors.torch.load_file(out / "model.safetensors")
    coded = load_folder(compressed)[UP]
    assert isinstance(coded, CodecTensor)
    assert torch.equal(dense[UP], coded.dequantize())
    AutoModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)
    assert status("decompress", out, tmp_path / "again") == 2


def test_file_and_back(matrices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coded, dense = tmp_path / "coded.safetensors", tmp_path / "dense.safetensors"
    assert status("compress", matrices, coded, "--snr-db", "25", *FAST) == 0
    assert "2 weights" in capsys.readouterr().out
    before = safetensors.torch.load_file(matrices)
    found = load_file(coded)
    assert coded_names(found) == {"weight", "half.weight"}
    assert torch.equal(found["counts"], before["counts"])
    assert status("decompress", coded, dense) == 0
    after = safetensors.torch.load_file(dense)
    with safetensors.safe_open(dense, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "license": "none", "torchcodec_weights.cli": "1"}
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
    assert torch.allclose(after["weight"], before["weight"], atol=0.5)


def test_lossless_file(matrices: Path, tmp_path: Path) -> None:
    coded, dense = tmp_path / "coded.safetensors", tmp_path / "dense.safetensors"
    assert status("compress", matrices, coded, "--codec", "lossless", "--include", "^weight") == 0
    assert coded_names(load_file(coded)) == {"weight"}
    assert status("decompress", coded, dense) == 0
    after = safetensors.torch.load_file(dense)
    for name, tensor in safetensors.torch.load_file(matrices).items():
        assert torch.equal(after[name], tensor)


def test_weights_that_share_a_tensor(tmp_path: Path) -> None:
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    tied, coded = tmp_path / "tied.safetensors", tmp_path / "coded.safetensors"
    save_file({"a": weight, "b": weight}, tied)
    assert status("compress", tied, coded, "--bits", "4", *FAST) == 0
    found = load_file(coded)
    assert found["a"].qdata.data_ptr() == found["b"].qdata.data_ptr()  # type: ignore[attr-defined]
    assert status("decompress", coded, tmp_path / "dense.safetensors") == 0
    after = safetensors.torch.load_file(tmp_path / "dense.safetensors")
    assert torch.equal(after["a"], after["b"])


def test_nothing_is_replaced_unless_forced(
    llama: Path, compressed: Path, matrices: Path, tmp_path: Path
) -> None:
    coded, dense = tmp_path / "coded.safetensors", tmp_path / "dense.safetensors"
    commands = [
        ("compress", llama, tmp_path / "coded", "--bits", "5", *FAST),
        ("decompress", compressed, tmp_path / "dense"),
        ("compress", matrices, coded, "--bits", "5", *FAST),
        ("decompress", coded, dense),
    ]
    for command in commands:
        assert status(*command) == 0
        before = command[2].stat().st_ino
        assert status(*command) == 2
        assert command[2].stat().st_ino == before
        assert status(*command, "--force") == 0
        assert command[2].stat().st_ino != before
    assert not list(tmp_path.glob(".*"))


def snapshot(path: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in [path, *path.rglob("*")] if p.is_file()}


def add(name: str) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("precious")

    return change


def add_link(out: Path) -> None:
    (out / "link").symlink_to("..")


def link_instead(out: Path) -> None:
    (out / "config.json").rename(out.parent / "config.json")
    (out / "config.json").symlink_to("../config.json")


def change_config(out: Path) -> None:
    with (out / "config.json").open("a") as file:
        file.write(" ")


def remove_list(out: Path) -> None:
    (out / ".torchcodec_weights.json").unlink()


def spoil_list(out: Path) -> None:
    (out / ".torchcodec_weights.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add("notes.txt"), "holds 'notes.txt' besides"),
        (add(".git/HEAD"), "holds '.git/HEAD' besides"),
        (add("1_Pooling/notes.txt"), "holds '1_Pooling/notes.txt' besides"),
        (add_link, "holds 'link' besides"),
        (link_instead, "holds 'config.json', which was changed"),
        (change_config, "holds 'config.json', which was changed"),
        (remove_list, "has no .torchcodec_weights.json"),
        (spoil_list, "has no .torchcodec_weights.json"),
    ],
)
def test_force_spares_directories_of_others(
    llama: Path,
    compressed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    message: str,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compressed, out)
    command = ("compress", llama, out, "--bits", "5", *FAST, "--force")
    change(out)
    before = snapshot(out)
    assert status(*command) == 2
    error = capsys.readouterr().err
    assert f"OUT='{out}' {message}: allowed with --force: what compress" in error
    assert snapshot(out) == before


def test_force_spares_files_of_others(matrices: Path, compressed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    command = ("compress", matrices, out, "--bits", "5", *FAST, "--force")
    safetensors.torch.save_file({"x": torch.ones(2)}, out, {"format": "pt"})
    for content in (b"precious", out.read_bytes()):
        out.write_bytes(content)
        assert status(*command) == 2
        assert out.read_bytes() == content
    out.unlink()
    os.mkfifo(out)
    assert status(*command) == 2
    assert out.is_fifo()
    # A directory for a file, a file for a directory.
    out.unlink()
    shutil.copytree(compressed, out)
    assert status(*command) == 2
    (tmp_path / "file").touch()
    assert status("decompress", compressed, tmp_path / "file", "--force") == 2
    assert (tmp_path / "file").is_file()


def test_force_looks_again_before_it_replaces(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding may take hours."""
    out = tmp_path / "out"
    command = ("compress", llama, out, "--bits", "5", *FAST)
    encode = run.encode_part

    def encode_and_write(*args: Any) -> None:
        encode(*args)
        (out / "notes.txt").write_text("precious")

    monkeypatch.setattr(run, "encode_part", encode_and_write)
    for options in ([], ["--force"]):
        assert status(*command, *options) == 2
        assert {path.name for path in out.iterdir()} == {"config.json", "notes.txt"}
    (out / "notes.txt").unlink()
    monkeypatch.undo()
    assert status(*command) == 0
    assert AutoModelForCausalLM.from_pretrained(out).lm_head is not None
    monkeypatch.setattr(run, "encode_part", encode_and_write)
    before = snapshot(out)
    assert status(*command, "--force") == 2
    assert snapshot(out) == before | {out / "notes.txt": b"precious"}


def test_leftovers_of_killed_runs(
    llama: Path,
    compressed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compressed, tmp_path / ".out.abcdefgh.tmp" / "old")
    monkeypatch.setattr(warnings, "showwarning", show_warning)
    # The former directory is put back, and so it is not replaced in silence.
    assert status("compress", llama, out, "--bits", "5", *FAST) == 2
    lines = capsys.readouterr().err.splitlines()
    leftover = tmp_path / ".out.abcdefgh.tmp"
    put_back = f"{out} was put back: a run was killed while it replaced it"
    assert lines[0] == f"torchcodec-weights: warning: {put_back}"
    assert lines[1].startswith(f"torchcodec-weights: warning: {leftover} is left of a run")
    assert lines[1].endswith(f"to remove it: rm -r {leftover}")
    assert f"OUT='{out}' exists: allowed" in lines[2]
    assert len(load_folder(out)) == len(load_folder(compressed))


def show_warning(message: Any, category: Any, filename: Any, lineno: Any, *_: Any) -> None:
    """As Python does outside of tests, where pytest collects warnings."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


@pytest.mark.parametrize("place", ["", "inside", ".."])
def test_output_is_apart_from_the_input(llama: Path, tmp_path: Path, place: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    before = sorted(folder.rglob("*"))
    assert status("compress", folder, folder / place, "--bits", "5", "--force") == 2
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("stage", ["quantize_", "save_compressed", "copy_other_files"])
def test_interrupt_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    work: Callable[..., None] = getattr(compress, stage)

    def interrupt(*args: Any, **kwargs: Any) -> None:
        work(*args, **kwargs)
        raise KeyboardInterrupt

    def load_it_whole(*args: Any) -> None:
        raise NamesDifferError("other names")

    monkeypatch.setattr(compress, "compress_distributed", load_it_whole)
    monkeypatch.setattr(compress, stage, interrupt)
    arguments = ("compress", llama, tmp_path / "out", "--bits", "5", *FAST, "--calibrate", "self")
    assert status(*arguments) == 130
    assert not list(tmp_path.iterdir())


def test_interrupt_keeps_what_was_there(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "file").touch()

    def interrupted() -> None:
        with unfinished(old) as temporary:
            temporary.mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (old / "file").exists()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "MODEL", "OUT"], "exactly one must be given"),
        (["compress", "MODEL", "OUT", "--bits", "2", "--step", "1"], "exactly one must be given"),
        (["compress", "MODEL", "OUT", "--bits", "two"], "--bits: invalid float value: 'two'"),
        (["compress", "MODEL", "OUT", "--bits", "-1"], "bits=-1.0: allowed"),
        (["compress", "MODEL", "OUT", "--codec", "mpeg"], "--codec: invalid choice: 'mpeg'"),
        (["compress", "MODEL", "OUT", "--bits", "2", "--preset", "x"], "preset='x'.*'medium'"),
        (["compress", "MODEL", "OUT", "--bits", "2", "--include", "("], "--include: '\\('"),
        (["compress", "MODEL", "OUT", "--bits", "2", "--include", "no"], "include='no'.*allowed"),
        (["compress", "nowhere", "OUT", "--bits", "2"], "MODEL='nowhere': allowed"),
        (["compress", "MODEL", "no/where", "--bits", "2"], "OUT='no/where': allowed"),
        (["decompress", "MODEL", "OUT"], "dense: allowed"),
        (["inspect", "nowhere"], "FILE_OR_DIR='nowhere': allowed"),
        (["inspect", "MODEL", "--html", "MODEL"], "--html=.*allowed: a file"),
        (["inspect", "MODEL", "--original", "MODEL"], "--original=.*allowed: with --html"),
        (["inspect", "MODEL", "--html", "o", "--original", "x"], "--original='x': allowed"),
        (["sweep", "--models", "MODEL", "--out", "o", "--html", "no/p"], "--html=.*allowed"),
        (["eval", "nowhere"], "'nowhere': allowed: smollm2, minilm"),
        (["eval", "MODEL", "--text", "nowhere"], "--text='nowhere': allowed"),
        (["sweep", "--models", "x", "--out", "o"], "model 'x': allowed: smollm2, minilm"),
        (["sweep", "--models", "MODEL", "--codecs", "mpeg", "--out", "o"], "'mpeg': allowed"),
        (["sweep", "--models", "MODEL", "--codecs", "vvc:x", "--out", "o"], "preset='x'.*'faster'"),
        (["sweep", "--models", "MODEL", "--bits", "0", "--out", "o"], "bits=0.0: allowed"),
        (["sweep", "--models", "MODEL", "--codecs", "jpeg", "--out", "MODEL"], "--out=.*allowed"),
    ],
)
def test_bad_input(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": str(llama), "OUT": "out"}
    assert status(*(places.get(argument, argument) for argument in arguments)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_corrupt_bitstream(
    compressed: Path, matrices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weight is named."""
    folder = tmp_path / "corrupt"
    shutil.copytree(compressed, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    path = folder / index[UP.replace("weight", "_weight_qdata")]
    corrupt(path, load_folder(folder)[UP])
    assert status("decompress", folder, tmp_path / "out") == 1
    assert re.search(rf"error: {UP}: .*CRC-32C", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    coded = tmp_path / "coded.safetensors"
    assert status("compress", matrices, coded, "--bits", "5", *FAST) == 0
    corrupt(coded, load_file(coded)["half.weight"])
    assert status("decompress", coded, tmp_path / "dense.safetensors") == 1
    assert re.search(r"error: half\.weight: .*CRC-32C", capsys.readouterr().err)
    assert not (tmp_path / "dense.safetensors").exists()
    path.write_bytes(b"\0")
    assert status("inspect", path) == 1


def corrupt(path: Path, weight: torch.Tensor) -> None:
    """Change the last byte of a weight's bitstream in a file."""
    assert isinstance(weight, CodecTensor)
    data, stream = bytearray(path.read_bytes()), weight.qdata.numpy().tobytes()
    data[data.index(stream) + len(stream) - 1] ^= 1
    path.write_bytes(data)


@pytest.mark.filterwarnings("ignore:.*stays dense")
def test_target_out_of_reach(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tinier_llama().save_pretrained(tmp_path / "llama")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "small": torch.randn(16, 16, generator=generator),
        "large": torch.randn(128, 128, generator=generator),
    }
    path, out = tmp_path / "small.safetensors", tmp_path / "out.safetensors"
    safetensors.torch.save_file(tensors, path)
    options = "--bits", "0.05", *FAST, "--embeddings", "dense"
    for source, target in ((tmp_path / "llama", tmp_path / "out"), (path, out)):
        assert status("compress", source, target, *options) == 2
        assert "no weight was encoded" in capsys.readouterr().err
        assert not target.exists()
    # Where some can be, the others stay dense, with a warning.
    assert status("compress", path, out, "--bits", "2", *FAST) == 0
    assert coded_names(load_file(out)) == {"large"}


def tinier_llama() -> Any:
    """None of its matrices can be coded in few bits."""
    return tiny_llama(hidden_size=32, intermediate_size=32, num_hidden_layers=1)


def test_sweep_of_a_target_that_leaves_all_dense(text: Path, tmp_path: Path) -> None:
    tinier_llama().save_pretrained(tmp_path / "llama")
    tokenizer().save_pretrained(tmp_path / "llama")
    out = tmp_path / "sweep.json"
    arguments = ["sweep", "--models", tmp_path / "llama", "--codecs", "ectcq:fast", "--bits", 0.05]
    with pytest.warns(UserWarning, match="stays dense"):
        assert status(*arguments, "--text", text, "--tokens", 200, "--out", out) == 0
    (row,) = json.loads(out.read_text())
    assert row["error"] == "no weight was encoded: all stay dense"


def test_inspect_writes_a_page(llama: Path, compressed: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert status("inspect", compressed, "--html", page, "--original", llama) == 0
    text = page.read_text()
    assert text.count('"before":[') == len(linear_names()) == text.count("<tr id=")
    assert status("inspect", compressed, "--html", page) == 0
    assert page.read_text().count('"before":null') == len(linear_names())


HOSTILE = "up\x1b[31m\nforged\u202e\x9b"
ESCAPED = r"up\x1b[31m\nforged\u202e\x9b"


def assert_printable(text: str) -> None:
    """But for line breaks, and what tqdm moves its bar with."""
    assert all(char.isprintable() or char in "\n\r" for char in text)


def test_names_from_files_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {HOSTILE: torch.randn(128, 128, generator=generator)}
    folder = tmp_path / HOSTILE
    folder.mkdir()
    dense, coded = folder / "dense.safetensors", folder / "coded.safetensors"
    safetensors.torch.save_file({**tensors, f"{HOSTILE}.small": torch.ones(16, 16)}, dense)
    monkeypatch.setattr(warnings, "showwarning", show_warning)
    commands = [
        ("compress", dense, coded, "--bits", "2", *FAST),
        ("inspect", coded),
        ("inspect", coded, "--extract-tile", HOSTILE, "0", folder / "tile"),
        ("inspect", folder / "nowhere"),
        ("decompress", coded, folder / "new.safetensors"),
        ("compress", dense, coded, HOSTILE, "--bits", "2"),
    ]
    for command in commands:
        status(*command)
        shown = capsys.readouterr()
        assert_printable(shown.out + shown.err)
        assert ESCAPED in shown.out + shown.err
    assert status("inspect", coded, "--json") == 0
    output = capsys.readouterr().out
    assert output.isascii()
    assert json.loads(output)["weights"][0]["name"] == HOSTILE
    corrupt(coded, load_file(coded)[HOSTILE])
    assert status("decompress", coded, folder / "other.safetensors") == 1
    error = capsys.readouterr().err
    assert_printable(error)
    assert f"error: {ESCAPED}: " in error


def test_log_records_are_escaped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers logs names of weights, in tables with colours."""

    def log(args: Any) -> None:
        logging.getLogger("transformers").warning("\x1b[31mtable\x1b[0m\n%s", HOSTILE[:7] + "\x9b")

    monkeypatch.setattr(codecs, "run", log)
    before = logging.getLogRecordFactory(), warnings.formatwarning
    assert status("codecs") == 0
    assert caplog.messages == ["table\nup\\x9b"]
    assert (logging.getLogRecordFactory(), warnings.formatwarning) == before


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\3\4", b"\x80\2.", b"\x80\2K\1.", b"text", b"\x80\2cos\nsystem\n.", b"\x80\2h\0."],
)
def test_inspect_what_is_no_state_dict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    assert status("inspect", tmp_path / "state.pt") == 2
    assert "allowed: a directory with safetensors, a .safetensors file" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_inspect_of_changed_state_dicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever torch.load raises, there is an error line."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "state.pt"
    torch.save({"weight": CodecTensor.from_hp(weight, codec_weight_only("ectcq", bits=4))}, path)
    data, rng = path.read_bytes(), np.random.default_rng(0)
    statuses = set()
    for _ in range(200):
        changed = bytearray(data)
        for place in rng.integers(1500, size=3):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        statuses.add(status("inspect", path))
    assert statuses == {0, 1, 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["set_seed"]},
        {"architectures": ["no\x1bthing"]},
        {"hidden_size": "many"},
        {"hidden_size": 64},
        {"num_attention_heads": 0},
        {"model_type": ["llama"]},
        {"hidden_act": "nothing"},
        {"rope_parameters": 3},
    ],
)
def test_config_that_makes_no_model(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert status("compress", folder, tmp_path / "out", "--bits", "5", *FAST) == 2
    assert f"{folder} " in capsys.readouterr().err


def test_codec_that_is_missing(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def missing(*, encoder: bool) -> None:
        raise CodecError("install this")

    monkeypatch.setattr(get_codec("jpeg"), "require", missing)
    assert status("compress", llama, tmp_path / "out", "--codec", "jpeg", "--bits", "3") == 1
    assert "install this" in capsys.readouterr().err


def test_inspect(compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("inspect", compressed) == 0
    table = capsys.readouterr().out
    assert UP in table
    assert "14 weights" in table
    assert status("inspect", compressed, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    row = next(row for row in report["weights"] if row["name"] == UP)
    coded = load_folder(compressed)[UP]
    assert isinstance(coded, CodecTensor)
    assert row == {
        "name": UP,
        "shape": [256, 128],
        "codec": "ectcq",
        "bits_per_weight": coded.bits_per_weight,
        "lossy": True,
        "snr_db": coded.header.snr_db,
        "stored_bytes": coded.stored_bytes,
        "dense_bytes": 4 * 256 * 128,
        "tiles": 1,
        "decoder": get_codec("ectcq").info().decoders["cpu"],
        "resident": "bits",
        "resident_bytes": 0,
        "resident_snr_db": None,
    }
    torch.save({"weight": coded}, tmp_path / "state.pt")
    assert status("inspect", tmp_path / "state.pt", "--json") == 0
    assert json.loads(capsys.readouterr().out)["stored_bytes"] == coded.stored_bytes


@pytest.mark.parametrize("codec", ["ectcq", *VIDEO, "jpeg", "jpeg2000", "jpegxl"])
def test_extracted_tile_is_a_standard_file(tmp_path: Path, codec: str) -> None:
    weight = torch.randn(1024, 512, generator=torch.Generator().manual_seed(0))
    config = codec_weight_only(codec, bits=3, preset=fastest(codec))
    coded = CodecTensor.from_hp(weight, config)
    path = tmp_path / "coded.safetensors"
    save_file({"layer.weight": coded}, path)
    assert status("inspect", path, "--extract-tile", "layer.weight", 1, tmp_path / "tile") == 0
    (out,) = tmp_path.glob("tile.*")
    data = out.read_bytes()
    payload, _ = read_tile(coded.qdata.numpy().data, coded.header, 1)
    assert data.endswith(payload)
    if codec in ("ectcq", "jpegxl"):  # no other decoder here
        assert data == payload
        return
    expected, depth = get_codec(codec).decode_frame(payload)  # type: ignore[attr-defined]
    if codec == "jpeg":
        expected = expected >> 4
    if codec in VIDEO:
        with av.open(str(out)) as container:
            (frame,) = container.decode(video=0)
        plane = frame.planes[0]
        samples = np.frombuffer(memoryview(plane), "<u2" if depth > 8 else "u1")
        samples = samples.reshape(frame.height, -1)[:, : frame.width]
    else:
        samples = np.asarray(Image.open(out))
    assert np.array_equal(samples, expected)
    assert status("inspect", path, "--extract-tile", "layer.weight", 1, out) == 2
    assert status("inspect", path, "--extract-tile", "layer.weight", 2, tmp_path / "other") == 2
    assert status("inspect", path, "--extract-tile", "layer", 0, tmp_path / "other") == 2


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """300 words."""
    path = tmp_path / "text.txt"
    rng = np.random.default_rng(0)
    path.write_text(" ".join(rng.choice(WORDS, 300)))
    return path


def number(output: str) -> float:
    return float(output.split()[-1])


def test_eval_perplexity(
    llama: Path, compressed: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = []
    for folder in (llama, compressed):
        assert status("eval", folder, "--text", text, "--tokens", 200) == 0
        values.append(number(capsys.readouterr().out))
    assert values[0] == pytest.approx(512, rel=0.2)  # the model knows nothing
    assert values[1] == pytest.approx(values[0], rel=0.01)
    assert status("eval", llama, "--text", text, "--tokens", 301) == 2
    assert "allowed: 1 to 300" in capsys.readouterr().err


def test_eval_sts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "bert"
    config = BertConfig(vocab_size=512, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(
        "a\tb\tc\t1\t5.0\tw5 w6 w7\tw5 w6 w7\n"
        'a\tb\tc\t2\t3.0\tw5 w6 "w7\tw5 w6 w8 w9\n'
        "a\tb\tc\t3\t0.0\tw5 w6 w7\tw100 w200 w300\n"
    )
    assert status("eval", folder, "--text", pairs) == 0
    assert number(capsys.readouterr().out) == 100
    assert status("eval", folder, "--task", "perplexity") == 2
    assert status("eval", folder, "--text", pairs, "--tokens", 5) == 2
    pairs.write_text("a\tb\n")
    assert status("eval", folder, "--text", pairs) == 2
    assert "line 1" in capsys.readouterr().err


def test_spearman() -> None:
    a = np.array([1.0, 2.0, 2.0, 5.0])
    assert spearman(a, np.exp(a)) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: 4.5 / sqrt(4.5 · 5).
    assert spearman(a, np.array([0.0, 2.0, 1.0, 3.0])) == pytest.approx(0.9486833)
    assert np.isnan(spearman(a, np.ones(4)))


def test_minilm_agrees_with_people() -> None:
    pairs = load_sts(data_file(STS_BENCHMARK))
    assert len(pairs.scores) == 1379
    some = SentencePairs(pairs.first[::16], pairs.second[::16], pairs.scores[::16])
    assert sts_spearman(*load_minilm(), some) > 75


def test_sweep_goes_on_where_it_was(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    quantize = sweep.quantize_

    def count(model: Any, config: Any) -> None:
        encoded.append(next(iter(config.fqn_to_config.values())).bits)
        if len(encoded) == interrupt_at:
            raise KeyboardInterrupt
        quantize(model, config)

    monkeypatch.setattr(sweep, "quantize_", count)
    out = tmp_path / "sweep.json"
    arguments = ["sweep", "--models", llama, "--codecs", "dense", "ectcq:fast", "jpeg"]
    arguments += ["--bits", 4, 5, "--text", text, "--tokens", 200, "--out", out]
    interrupt_at = 2
    assert status(*arguments) == 130
    first = json.loads(out.read_text())
    assert [row["codec"] for row in first] == ["dense", "ectcq"]
    interrupt_at = 0
    assert status(*arguments) == 0
    rows = json.loads(out.read_text())
    assert rows[:2] == first
    assert encoded == [4, 5, 5, 4, 5]
    assert status(*arguments) == 0
    assert len(encoded) == 5
    assert json.loads(out.read_text()) == rows
    assert status(*arguments, "--html", tmp_path / "sweep.html") == 0
    page = (tmp_path / "sweep.html").read_text()
    points = [row for row in rows if row["codec"] != "dense"]
    assert page.count("<button") == 2 * len(points)
    for row in points:
        assert f"{row['bits']:.3f} bits per weight<br>perplexity {row['value']:.2f}<br>" in page
    dense, row = rows[:2]
    assert dense["bits"] == 32
    assert row["value"] == pytest.approx(dense["value"], rel=0.02)
    assert row["preset"] == "fast"
    assert row["bits"] <= 4
    assert row["snr_db"] > 20
    assert row["weights"] == sum(torch.Size(t.shape).numel() for t in linear_tensors(llama))
    assert row["encode_mweights_per_s"] > 0
    assert row["decode_mweights_per_s"] > 0


def linear_tensors(folder: Path) -> list[torch.Tensor]:
    return [tensor for name, tensor in load_folder(folder).items() if name in linear_names()]


def test_sweep_notes_a_rate_out_of_reach(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: Any, config: Any) -> None:
        raise sweep.RateError("bits=2 cannot be reached", 3.0)

    monkeypatch.setattr(sweep, "quantize_", fail)
    out = tmp_path / "sweep.json"
    arguments = ["sweep", "--models", llama, "--codecs", "jpeg", "--bits", 2]
    assert status(*arguments, "--text", text, "--tokens", 200, "--out", out) == 0
    (row,) = json.loads(out.read_text())
    assert row["error"] == "bits=2 cannot be reached"
