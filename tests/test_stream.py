"""Checkpoints encoded tensor by tensor: the same bytes as in memory, after kills and by many."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from conftest import tiny_llama
from test_files import largest_file
from torchao.quantization import FqnToConfig
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from torchcodec_weights import CodecTensor, codec_weight_only, load_file, quantize_, save_file
from torchcodec_weights.cli import main
from torchcodec_weights.convert import run
from torchcodec_weights.convert.output import check_replaceable, record_in_card
from torchcodec_weights.convert.plan import shares
from torchcodec_weights.format.safetensors import read_header
from torchcodec_weights.models.checkpoint import load_folder
from torchcodec_weights.models.huggingface import load_model, weight_names

pytestmark = pytest.mark.filterwarnings("ignore:Config Deprecation")

OPTIONS = ["--bits", "4", "--preset", "fast", "--embeddings", "dense"]
CONFIG = codec_weight_only("ectcq", bits=4, preset="fast")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 8 layers in bfloat16, in six files, with a file of its own beside them."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    model = tiny_llama(hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="2MB")
    assert len(list(folder.glob("*.safetensors"))) == 6
    (folder / "notes.txt").write_text("notes")
    return folder


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after `compress`."""
    out = tmp_path_factory.mktemp("whole") / "llama"
    assert status("compress", llama, out, *OPTIONS) == 0
    return out


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(llama, tmp_path / "copy" / "llama"))


def status(*arguments: Any) -> int:
    """Exit status of the program."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as error:
        return int(error.code or 0)


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "torchcodec_weights.cli", *map(str, arguments)]


def digest(folder: Path) -> str:
    """One hash of the names and bytes of all files."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        found.update(f"{path.relative_to(folder)} {len(data)} ".encode() + data)
    return found.hexdigest()


def work(out: Path) -> Path:
    return out.with_name(f".{out.name}.unfinished")


def finished(out: Path) -> int:
    """How many tensors are finished in the working directory of an output."""
    parts = [path for path in (work(out) / "parts").iterdir() if path.suffix != ".tmp"]
    done = [json.loads(p.read_text()) for p in (work(out) / "done").glob("*.json")]
    return len({path.name for path in parts}) + sum(len(table["encoded"]) for table in done)


def same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert type(found[name]) is type(tensor), name
        if isinstance(tensor, CodecTensor):
            other = found[name]
            for inner in tensor.__tensor_flatten__()[0]:
                assert torch.equal(getattr(other, inner), getattr(tensor, inner)), name
        else:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("options", "include", "embedding_bits"),
    [
        ([], None, 6),
        (["--embeddings", "dense"], None, None),
        (["--exclude", "embed|lm_head"], None, None),
        (["--include", "q_proj", "--embeddings", "5.5"], "q_proj", 5.5),
    ],
)
def test_weights_are_those_of_quantize(
    llama: Path,
    tmp_path: Path,
    options: list[str],
    include: str | None,
    embedding_bits: float | None,
) -> None:
    out = tmp_path / "out"
    command = ("compress", llama, out, "--bits", "4", "--preset", "fast", *options)
    assert status(*command) == 0
    model = load_model(llama)
    configs = dict.fromkeys(weight_names(model, include), CONFIG)
    if embedding_bits is not None:
        embedding = codec_weight_only(bits=embedding_bits, preset="fast")
        configs["lm_head.weight"] = configs["model.embed_tokens.weight"] = embedding
    quantize_(model, FqnToConfig(configs))
    expected = model.state_dict()
    expected.pop("lm_head.weight")  # tied
    same_weights(load_folder(out), expected)
    assert {p.name for p in out.glob("*.safetensors")} == {
        p.name for p in llama.glob("*.safetensors")
    }
    opened = AutoModelForCausalLM.from_pretrained(out)
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    ids = torch.tensor([[1, 5, 7, 300]])
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, model(ids).logits)
    assert (out / "notes.txt").read_text() == "notes"


@pytest.mark.parametrize("model", ["smollm2", "minilm"])
def test_real_models(tmp_path: Path, model: str) -> None:
    from torchcodec_weights.evaluation.models import load_minilm, load_smollm2

    loaded = (load_smollm2(torch.bfloat16) if model == "smollm2" else load_minilm())[0]
    loaded.save_pretrained(tmp_path / "dense")
    assert status("compress", tmp_path / "dense", tmp_path / "out", *OPTIONS) == 0
    again = load_model(tmp_path / "dense")
    quantize_(again, FqnToConfig(dict.fromkeys(weight_names(again), CONFIG)))
    found = load_folder(tmp_path / "out")
    expected = {name: again.state_dict()[name] for name in found}
    same_weights(found, expected)
    # And as `save_file` writes them.
    save_file(expected, tmp_path / "saved.safetensors")
    same_weights(load_file(tmp_path / "saved.safetensors"), found)


def test_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a.weight": torch.randn(256, 300, generator=generator),
        "b.weight": torch.randn(3, 64, 64, generator=generator).half(),
        "c": torch.randn(64, generator=generator),
        "d": torch.arange(6).reshape(2, 3),
    }
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    safetensors.torch.save_file(tensors, path, {"license": "none"})
    assert status("compress", path, out, *OPTIONS) == 0
    expected = dict(tensors)
    for name in ("a.weight", "b.weight"):
        expected[name] = CodecTensor.from_hp(tensors[name], CONFIG)
    same_weights(load_file(out), expected)
    first = out.read_bytes()
    assert status("compress", path, out, *OPTIONS) == 2
    assert status("compress", path, out, *OPTIONS, "--force") == 0
    assert out.read_bytes() == first
    assert not list(tmp_path.glob(".*"))


def test_runs_are_equal(llama: Path, whole: Path, tmp_path: Path) -> None:
    assert status("compress", llama, tmp_path / "out", *OPTIONS) == 0
    assert digest(tmp_path / "out") == digest(whole)


def test_kills(llama: Path, whole: Path, tmp_path: Path) -> None:
    """Five times at a random moment of the work; then it is finished, with one hash."""
    out = tmp_path / "out"
    arguments = command("compress", llama, out, *OPTIONS)
    rng = random.Random(0)
    counts = []
    for _ in range(5):
        before = finished(out) if (work(out) / "done").is_dir() else 0
        with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as process:
            # A run that goes on: until it has finished something more. Then somewhere.
            while process.poll() is None and not (
                (work(out) / "done").is_dir() and finished(out) > before
            ):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
        assert process.returncode == -signal.SIGKILL
        counts.append(finished(out))
        assert re.search("is not whole yet", (out / "config.json").read_text())
    assert counts == sorted(counts)
    assert counts[0] > 0
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert "56 weights" in done.stdout
    assert digest(out) == digest(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("stage", ["begin", "finish_file", "publish", "remove"])
def test_stopped_between_two_steps(
    llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """A stop after each step of the working directory: the next run goes on."""
    work_step = getattr(run.Work, stage)

    def stop(*args: Any) -> None:
        if stage != "remove":
            work_step(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Work, stage, stop)
    monkeypatch.setattr(run.Work, "has_parts", lambda self: True)
    assert status("compress", llama, tmp_path / "out", *OPTIONS) == 130
    monkeypatch.undo()
    if stage != "publish":
        assert status("compress", llama, tmp_path / "out", *OPTIONS) == 0
    assert digest(tmp_path / "out") == digest(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_while_another_run_is_removed(
    llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of one with other settings is not taken for this one's."""
    out = tmp_path / "out"
    stop_after(monkeypatch, 9)
    assert status("compress", llama, out, *OPTIONS, "--bits", "3") == 130
    monkeypatch.undo()
    rmtree = shutil.rmtree

    def stop(path: Any, **options: Any) -> None:
        if Path(path).name == "parts":
            raise KeyboardInterrupt
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", stop)
    assert status("compress", llama, out, *OPTIONS, "--force") == 130
    monkeypatch.undo()
    assert (work(out) / "parts" / "000000").exists()
    assert status("compress", llama, out, *OPTIONS) == 0
    assert digest(out) == digest(whole)


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Interrupt the next run after some tensors."""
    encode, calls = run.encode_part, []

    def counted(*args: Any) -> None:
        if len(calls) >= count:
            raise KeyboardInterrupt
        encode(*args)
        calls.append(1)

    monkeypatch.setattr(run, "encode_part", counted)


def test_not_whole_yet(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    stop_after(monkeypatch, 5)
    assert status("compress", llama, out, *OPTIONS) == 130
    monkeypatch.undo()
    message = "is not whole yet: .*the same command again goes on"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        LlamaForCausalLM.from_pretrained(out)
    with pytest.raises(ValueError, match=message):
        load_folder(out)
    for name in ("inspect", "verify", "eval", "decompress"):
        capsys.readouterr()
        assert status(name, out, *([tmp_path / "x"] if name == "decompress" else [])) == 2
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*OPTIONS, "--bits", "3"], "bits was 4.0 and is 3.0"),
        ([*OPTIONS, "--exclude", "q_proj"], "exclude was None and is 'q_proj'"),
        ([*OPTIONS, "--preset", "best"], "preset was 'fast' and is 'best'"),
        ([*OPTIONS, "--embeddings", "5"], "embeddings was None and is {"),
    ],
)
def test_other_settings(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    options: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    stop_after(monkeypatch, 3)
    assert status("compress", llama, out, *OPTIONS) == 130
    monkeypatch.undo()
    before = finished(out)
    assert status("compress", llama, out, *options) == 2
    assert re.search(message, capsys.readouterr().err)
    assert finished(out) >= before
    if message.startswith("bits"):
        assert status("compress", llama, out, *options, "--force") == 0
        assert not work(out).exists()
        first = next(w for w in load_folder(out).values() if isinstance(w, CodecTensor))
        assert first.bits_per_weight < 3


def write_tensor(folder: Path, name: str, change: float) -> None:
    """Change a tensor of a model in place; the file keeps its size."""
    for path in folder.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        if name in tensors:
            tensors[name][0, 0] += change
            safetensors.torch.save_file(tensors, path, {"format": "pt"})
            return
    raise LookupError(name)


def test_changed_source(
    llama: Path,
    copy: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    out = tmp_path / "out"
    stop_after(monkeypatch, 9)
    assert status("compress", copy, out, *OPTIONS) == 130
    monkeypatch.undo()
    before = finished(out)
    name = "model.layers.0.self_attn.q_proj.weight"
    write_tensor(copy, name, 1.0)
    capsys.readouterr()
    assert status("compress", copy, out, *OPTIONS) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert "changed since OUT was begun: its tensor" in line
    assert finished(out) >= before  # what was at work at the interrupt came to its end
    # Written again with what it held, it is the same source.
    shutil.rmtree(copy)
    shutil.copytree(llama, copy)
    for path in copy.iterdir():
        os.utime(path)
    assert status("compress", copy, out, *OPTIONS) == 0
    assert digest(out) == digest(whole)


def test_source_of_another_size(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    stop_after(monkeypatch, 3)
    assert status("compress", copy, out, *OPTIONS) == 130
    monkeypatch.undo()
    path = sorted(copy.glob("*.safetensors"))[-1]
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**tensors, "new": torch.ones(5)}, path, {"format": "pt"})
    capsys.readouterr()
    assert status("compress", copy, out, *OPTIONS) == 2
    assert "changed since OUT was begun: size was" in capsys.readouterr().err


def test_source_cut_short(copy: Path, tmp_path: Path, capsys: Any) -> None:
    path = sorted(copy.glob("*.safetensors"))[1]
    os.truncate(path, path.stat().st_size - 1)
    assert status("compress", copy, tmp_path / "out", *OPTIONS) == 1
    error = capsys.readouterr().err
    assert re.search(rf"{path.name} is cut short: \d+ bytes, and its tensor 'model\.", error)
    assert not (tmp_path / "out").exists()
    assert not work(tmp_path / "out").exists()


def test_weights_that_are_not_finite(copy: Path, tmp_path: Path, capsys: Any) -> None:
    name = "model.layers.7.mlp.up_proj.weight"
    write_tensor(copy, name, float("nan"))
    assert status("compress", copy, tmp_path / "out", *OPTIONS) == 2
    assert f"{name}: weight holds NaN" in capsys.readouterr().err


@pytest.mark.parametrize("size", [20_000, 200_000], ids=["of a tensor", "of a file"])
def test_full_disk(llama: Path, whole: Path, tmp_path: Path, capsys: Any, size: int) -> None:
    out = tmp_path / "out"
    with largest_file(size):
        assert status("compress", llama, out, *OPTIONS) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert "File too large" in line
    if size > 20_000:
        assert finished(out) > 0
    assert status("compress", llama, out, *OPTIONS) == 0
    assert digest(out) == digest(whole)


def test_damaged_part(
    llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    stop_after(monkeypatch, 3)
    assert status("compress", llama, out, *OPTIONS) == 130
    monkeypatch.undo()
    path = next(p for p in sorted((work(out) / "parts").iterdir()) if p.suffix != ".tmp")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    capsys.readouterr()
    assert status("compress", llama, out, *OPTIONS) == 1
    assert "was damaged and is removed" in capsys.readouterr().err
    assert status("compress", llama, out, *OPTIONS) == 0
    assert digest(out) == digest(whole)


def test_delete_source(
    copy: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file goes when its output is there; what is stopped then goes on without it."""
    out = tmp_path / "out"
    arguments = ("compress", copy, out, *OPTIONS, "--delete-source")
    stop_after(monkeypatch, 30)
    assert status(*arguments) == 130
    monkeypatch.undo()
    left = {path.name for path in copy.glob("*.safetensors")}
    done = {path.stem for path in (work(out) / "done").iterdir()}
    assert done
    assert not left & done
    assert len(left | done) == 6
    assert status(*arguments) == 0
    assert digest(out) == digest(whole)
    assert not list(copy.glob("*.safetensors"))
    assert (copy / "config.json").exists()


def test_links_are_not_deleted(copy: Path, tmp_path: Path, capsys: Any) -> None:
    path = next(copy.glob("*-00003-*.safetensors"))
    path.rename(copy / "there")
    path.symlink_to("there")
    out = tmp_path / "out"
    assert status("compress", copy, out, *OPTIONS, "--delete-source") == 2
    assert f"--delete-source: {path} is a link: allowed" in capsys.readouterr().err
    assert not out.exists()
    assert len(list(copy.glob("*.safetensors"))) == 6


def test_workers(llama: Path, whole: Path, tmp_path: Path, capsys: Any) -> None:
    """Each encodes its share; what a dead one did not, the last step does."""
    out = tmp_path / "out"
    assert status("compress", llama, out, *OPTIONS, "--worker", "0/2") == 0
    assert "share of worker 0/2 is finished" in capsys.readouterr().out
    first = finished(out)
    assert 10 < first < 46
    assert status("compress", llama, out, *OPTIONS, "--worker", "1/2") == 0
    assert finished(out) == 56
    assert status("compress", llama, out, *OPTIONS) == 0
    assert digest(out) == digest(whole)
    lost = tmp_path / "lost"
    assert status("compress", llama, lost, *OPTIONS, "--worker", "1/2") == 0
    assert status("compress", llama, lost, *OPTIONS) == 0
    assert digest(lost) == digest(whole)


def test_workers_at_one_time(llama: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    processes = [
        subprocess.Popen(
            command("compress", llama, out, *OPTIONS, "--worker", f"{i}/2"),
            stderr=subprocess.DEVNULL,
        )
        for i in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert finished(out) == 56
    assert status("compress", llama, out, *OPTIONS) == 0
    assert digest(out) == digest(whole)


def by_torchrun(model: Path, out: Path, *options: str, timeout: float, **environment: str) -> str:
    """What two processes of torchrun print that compress a model."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2", "-m", "torchcodec_weights.cli"]
    done = subprocess.run(
        [*launcher, "compress", str(model), str(out), *options],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_torchrun(llama: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert by_torchrun(llama, out, *OPTIONS, timeout=200).count("56 weights") == 1
    assert digest(out) == digest(whole)


def test_two_runs_do_not_write_one_output(llama: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    with run.Work(out, is_file=False).locked(None):
        assert status("compress", llama, out, *OPTIONS) == 2
        assert "another run is writing it now" in capsys.readouterr().err
        assert status("compress", llama, out, *OPTIONS, "--worker", "0/2") == 2


def test_shares_are_even() -> None:
    class Sized:
        def __init__(self, name: str, weights: int) -> None:
            self.name, self.weights = name, weights

    tasks: list[Any] = [Sized(str(i), 1 + i * i % 97) for i in range(100)]
    parts = shares([[task] for task in tasks], 7)
    assert sorted(t.name for part in parts for t in part) == sorted(t.name for t in tasks)
    sizes = [sum(t.weights for t in part) for part in parts]
    assert max(sizes) - min(sizes) <= 97
    assert [[t.name for t in p] for p in shares([[task] for task in tasks[::-1]], 7)] == [
        [t.name for t in p] for p in parts
    ]


class Server(ThreadingHTTPServer):
    """Serves the files of a directory by ranges; says which bytes were asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.sent = 0
        self.refused: range | None = None
        self.ranges = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = 0, len(data)
        if found and self.server.ranges:
            start, end = int(found[1]), int(found[2]) + 1
        refused = self.server.refused
        if refused is not None and path.suffix == ".safetensors" and start in refused:
            self.send_error(500)
            return
        self.send_response(206 if found and self.server.ranges else 200)
        self.send_header("ETag", hashlib.sha256(data).hexdigest())
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if body:
            self.wfile.write(data[start:end])
            self.server.sent += end - start


@pytest.fixture
def server(llama: Path) -> Iterator[Server]:
    server = Server(llama.parent)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def test_url(llama: Path, whole: Path, tmp_path: Path, server: Server) -> None:
    out = tmp_path / "out"
    assert status("compress", f"{server.url}/llama", out, *OPTIONS) == 0
    # Files of its own are not listed by this server.
    (out / "notes.txt").write_text("notes")
    for name in [path.name for path in whole.glob("*.safetensors*")]:
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    size = sum(path.stat().st_size for path in llama.iterdir())
    assert server.sent < 1.1 * size, "each tensor is fetched once"
    AutoModelForCausalLM.from_pretrained(out)
    one = next(path.name for path in llama.glob("*.safetensors"))
    url = f"{server.url}/llama/{one}"
    assert status("compress", url, tmp_path / "url.safetensors", *OPTIONS) == 0
    assert status("compress", llama / one, tmp_path / "here.safetensors", *OPTIONS) == 0
    found = [(tmp_path / name).read_bytes() for name in ("url.safetensors", "here.safetensors")]
    assert found[0] == found[1]
    assert status("compress", f"file://{llama}", tmp_path / "file", *OPTIONS) == 0
    assert digest(tmp_path / "file") == digest(whole)


def test_unreadable_tensor(tmp_path: Path, whole: Path, server: Server, capsys: Any) -> None:
    """Of a server that fails there: named in one line, and nothing is lost."""
    out = tmp_path / "out"
    server.refused = range(1_000_000, 1_200_000)
    assert status("compress", f"{server.url}/llama", out, *OPTIONS) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert re.search(r"tensor 'model\.\S+' cannot be read: http://127\S+: .*500", line)
    server.refused = None
    assert status("compress", f"{server.url}/llama", out, *OPTIONS) == 0
    for path in whole.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_server_without_ranges(tmp_path: Path, server: Server, capsys: Any) -> None:
    server.ranges = False
    assert status("compress", f"{server.url}/llama", tmp_path / "out", *OPTIONS) == 1
    assert "needed: a server that answers requests for ranges" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-memory", "many"], "--max-memory: 'many': allowed: text like '8 GiB'"),
        (
            ["--max-memory", "100MB"],
            r"--max-memory=0\.09 GiB: allowed: \d\.\d+ GiB or more, for",
        ),
        (["--worker", "2/2"], r"--worker: '2/2': allowed: I/N"),
        (["--worker", "0/2", "--force"], "--force: allowed without --worker"),
    ],
)
def test_bad_options(
    llama: Path, tmp_path: Path, capsys: Any, arguments: list[str], message: str
) -> None:
    assert status("compress", llama, tmp_path / "out", *OPTIONS, *arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_dry_run(llama: Path, tmp_path: Path, capsys: Any) -> None:
    assert status("compress", llama, tmp_path / "out", *OPTIONS, "--dry-run") == 0
    table = capsys.readouterr().out
    assert table.count("_proj.weight") == 57  # each once, and one is the sample
    assert re.search(r"56 weights, 4,718,592 numbers: 9\.4 MB, about 2\.3 MB encoded", table)
    assert re.search(r"About \d+ seconds here", table)
    assert "Calibration" not in table
    assert not list(tmp_path.iterdir())


def test_dry_run_of_torchrun(
    llama: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process prints it, and the others nothing."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 57), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert status("compress", llama, tmp_path / "out", *OPTIONS, "--dry-run") == 0
        assert capsys.readouterr().out.count("_proj.weight") == lines


def test_dry_run_of_two_rates(llama: Path, tmp_path: Path, capsys: Any) -> None:
    """The embedding at 6 bits, 98,304 bytes, beside 56 weights at 4."""
    text = tmp_path / "text.txt"
    text.write_text("a text")
    options = ["--bits", "4", "--preset", "fast", "--embeddings", "6", "--calibrate", text]
    assert status("compress", llama, tmp_path / "out", *options, "--dry-run") == 0
    table = capsys.readouterr().out
    assert re.search(r"57 weights, 4,849,664 numbers: 9\.7 MB, about 2\.4 MB encoded", table)
    assert re.search(r"sample of model\.embed_tokens\S+ and .* sample of model\.layers", table)
    assert "Calibration is not in this time" in table
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def corrupt(path: Path, start: int) -> None:
    data = bytearray(path.read_bytes())
    data[start] ^= 1
    path.write_bytes(data)


def test_verify_names_what_is_damaged(whole: Path, tmp_path: Path, capsys: Any) -> None:
    """Also of tensors that are not encoded."""
    assert status("verify", whole) == 0
    line = capsys.readouterr().out
    assert re.search(r"56 encoded weights, [\d,]+ bytes, and 270,\d+ bytes of other tensors", line)
    assert status("verify", whole, "--decode") == 0
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    places = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for name, weight in (
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.3.mlp.up_proj._weight_qdata", "model.layers.3.mlp.up_proj.weight"),
    ):
        path = out / places[name]
        before = path.read_bytes()
        corrupt(path, read_header(path).tensors[name].end - 1)
        capsys.readouterr()
        assert status("verify", out) == 1
        (line,) = capsys.readouterr().out.splitlines()
        assert re.search(rf"{re.escape(weight)}: .*CRC-32C", line)
        path.write_bytes(before)


def test_verify_compares_what_is_decoded(whole: Path, tmp_path: Path, capsys: Any) -> None:
    """Streams that are intact, but of other weights."""
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    name = "model.layers.3.mlp.up_proj.weight"
    table = json.loads((out / ".torchcodec_weights.json").read_text())["weights"][name]
    digest = table["decoded_sha256"].encode()
    (path,) = (path for path in out.glob("*.safetensors") if digest in path.read_bytes())
    path.write_bytes(path.read_bytes().replace(digest, b"0" * 64))
    assert status("verify", out) == 0
    capsys.readouterr()
    assert status("verify", out, "--decode") == 1
    assert f"{name}: what it decodes to has the SHA-256" in capsys.readouterr().out


def test_card(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "models--meta--Small" / "snapshots" / "main"))
    (folder / "README.md").write_text(
        "---\nlicense: mit\nlibrary_name: other\nbase_model:\n- x/y\ntags:\n- a\n---\n"
        "# Small\n\nText.\n"
    )
    assert status("compress", folder, tmp_path / "out", *OPTIONS) == 0
    front, _, text = (tmp_path / "out" / "README.md").read_text()[4:].partition("\n---\n")
    table = yaml.safe_load(front)
    facts = table.pop("torchcodec_weights")
    assert table == {
        "base_model": "meta/Small",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "mit",
        "tags": ["a"],
    }
    assert facts["codec"] == "ectcq"
    assert 3.9 < facts["bits_per_weight"] <= 4
    assert 20 < facts["mean_snr_db"] < 26
    assert facts["encoded_weights"] == 4_718_592
    assert "LlamaForCausalLM.from_pretrained(" in text
    assert text.endswith("# Small\n\nText.\n")
    # What `eval` measured is added, and the output is still known for what compress wrote.
    for value in (15.25, 15.5):
        assert record_in_card(tmp_path / "out", "perplexity_wikitext2", value)
    changed = (tmp_path / "out" / "README.md").read_text()
    facts = yaml.safe_load(changed[4:].partition("\n---\n")[0])["torchcodec_weights"]
    assert facts["perplexity_wikitext2"] == 15.5
    assert changed.replace("  perplexity_wikitext2: 15.5\n", "") == f"---\n{front}\n---\n{text}"
    check_replaceable(tmp_path / "out", force=True)
    (tmp_path / "out" / "README.md").write_text("mine")
    assert not record_in_card(tmp_path / "out", "perplexity_wikitext2", 1.0)


# Not ru_maxrss, which a process inherits from the one that started it.
MEASURED = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from memory_of import status
from torchcodec_weights.cli import main
end = main(sys.argv[1:])
print("peak", status("VmHWM"))
sys.exit(end)
"""


def test_memory_is_limited(tmp_path: Path) -> None:
    """Of many matrices as many are in memory as the limit allows; all of them would exceed it."""
    generator = torch.Generator().manual_seed(0)
    shape = 2048, 4096
    tensors = {
        f"{index}.weight": torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)
        for index in range(16)
    }
    path = tmp_path / "in.safetensors"
    safetensors.torch.save_file(tensors, path)
    limit = 700 * 10**6
    arguments = ["compress", path, tmp_path / "out.safetensors", *OPTIONS]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, arguments), "--max-memory", f"{limit}B"],
        check=True,
        capture_output=True,
        text=True,
    )
    peak = int(done.stdout.split("peak ")[1])
    assert peak < limit
    # The process as such takes most of it.
    assert peak > limit / 2


def test_opens_in_place(whole: Path) -> None:
    """Weights are mapped from the files, not copied."""
    model = AutoModelForCausalLM.from_pretrained(whole)
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            first, end = (int(number, 16) for number in line.split()[0].split("-"))
            mapped.append(range(first, end))
    found = 0
    for parameter in model.parameters():
        tensor = parameter.data
        data = tensor.qdata if isinstance(tensor, CodecTensor) else tensor
        assert any(data.data_ptr() in addresses for addresses in mapped)
        found += isinstance(tensor, CodecTensor)
    assert found == 56
