"""transformers: load with a configuration, save, push, load again, generate, pipelines."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import cpu_offload
from conftest import snr_db, tiny_llama, word_tokenizer
from safetensors import safe_open
from torch import nn
from torchao.quantization import FqnToConfig
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    TorchAoConfig,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
    pipeline,
)

from torchcodec_weights import CodecError, CodecTensor, codec_weight_only, quantize_
from torchcodec_weights.cli import main
from torchcodec_weights.evaluation.models import load_smollm2

GROUP = "transformers"
EMBEDDING = "model.embed_tokens.weight"
PROJECTION = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with tied embeddings, saved."""
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama(num_hidden_layers=3).save_pretrained(folder)
    return folder


def quantization(*, embeddings: bool) -> TorchAoConfig:
    linear = codec_weight_only("ectcq", bits=5, preset="fast")
    if not embeddings:
        return TorchAoConfig(linear)
    config = FqnToConfig({"model.embed_tokens": linear, "_default": linear})
    return TorchAoConfig(config, include_input_output_embeddings=True)


def names_in(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.mark.feature(
    GROUP,
    "`from_pretrained` with `TorchAoConfig`, `save_pretrained`, `from_pretrained`, sharded",
    "transformers 5",
)
@pytest.mark.feature(
    GROUP, "tied embeddings encoded once, stored once, stay tied", "with FqnToConfig"
)
@pytest.mark.filterwarnings("ignore:Config Deprecation")
@pytest.mark.parametrize("shard", ["100KB", "1GB"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_load_save_load(dense: Path, tmp_path: Path, embeddings: bool, shard: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=quantization(embeddings=embeddings)
    )
    found = weights(model)
    assert isinstance(found[PROJECTION], CodecTensor)
    assert isinstance(found[EMBEDDING], CodecTensor) == embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.tensor([[1, 5, 7, 300]])
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "100KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again", max_shard_size=shard)
    for folder in (tmp_path, tmp_path / "again"):
        stored = [name for path in folder.glob("*.safetensors") for name in names_in(path)]
        assert not any(name.startswith("lm_head.") for name in stored)
        assert ("model.embed_tokens._weight_qdata" in stored) == embeddings
    for model in (again, AutoModelForCausalLM.from_pretrained(tmp_path / "again")):
        for name, weight in weights(model).items():
            assert isinstance(weight, CodecTensor) == isinstance(found[name], CodecTensor), name
        assert model.lm_head.weight is model.model.embed_tokens.weight
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)


@pytest.fixture(scope="module")
def encoded(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama with encoded Linear weights and embeddings, and a tokenizer of words."""
    folder = tmp_path_factory.mktemp("encoded")
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=quantization(embeddings=True)
    )
    model.save_pretrained(folder)
    word_tokenizer([f"w{i}" for i in range(3, 512)]).save_pretrained(folder)
    return folder


IDS = torch.tensor([[1, 5, 7, 300]])


@pytest.mark.feature(GROUP, "a model opened as another class: `AutoModel` of a language model")
def test_other_classes_than_the_saved_one(encoded: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(encoded)
    inner = AutoModel.from_pretrained(encoded)
    assert isinstance(inner.layers[0].mlp.up_proj.weight, CodecTensor)
    with torch.no_grad():
        assert torch.equal(inner(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
        inner.save_pretrained(tmp_path)
        outer = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(outer(IDS).logits, model(IDS).logits)


@pytest.mark.feature(GROUP, "`pipeline`: text generation, feature extraction")
def test_pipelines(encoded: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(encoded)
    prompt = "<s> w5 w7 w300"
    length = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    generator = pipeline("text-generation", model=str(encoded))
    (answer,) = generator(prompt, return_tensors=True, **length)
    assert answer["generated_token_ids"] == model.generate(IDS, **length)[0].tolist()
    extractor = pipeline("feature-extraction", model=str(encoded))
    with torch.no_grad():
        expected = model.model(IDS).last_hidden_state
    assert torch.equal(torch.tensor(extractor(prompt)), expected)


@pytest.mark.feature(
    GROUP,
    '`device_map="auto"`, `"cpu"`; offload to CPU memory, saved from there',
    "disk: accelerate's `cpu_offload`, as the weights of a file are mapped",
)
def test_device_maps(encoded: Path, tmp_path: Path) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(encoded).generate(IDS, **options)
        for device_map in ("auto", "cpu", {"": "cpu"}):
            model = AutoModelForCausalLM.from_pretrained(encoded, device_map=device_map)
            assert torch.equal(model.generate(IDS, **options), expected)
        address = model.model.layers[0].mlp.up_proj.weight.qdata.data_ptr()
        assert any(start <= address < end for start, end in mappings(encoded))
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
        assert torch.equal(model.generate(IDS, **options), expected)
        model.hf_device_map = {"": "cpu"}  # as where a GPU runs what is offloaded to the CPU
        with pytest.warns(UserWarning, match="save a model with offloaded modules"):
            model.save_pretrained(tmp_path)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(saved.generate(IDS, **options), expected)


def mappings(folder: Path) -> Iterator[tuple[int, int]]:
    """Addresses at which the files of a directory are mapped into memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            start, end = line.split()[0].split("-")
            yield int(start, 16), int(end, 16)


def test_offload_to_disk_is_refused(dense: Path, tmp_path: Path) -> None:
    """docs/upstream.md says what happens in transformers."""
    config = quantization(embeddings=False)
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(
        tmp_path
    )
    options = {"offload_folder": tmp_path / "offload"}
    with pytest.raises(ValueError, match="disk offload with a pre-quantized torchao model"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map="auto", max_memory={"cpu": 600_000}, **options
        )
    model = AutoModelForCausalLM.from_pretrained(
        dense, device_map={"": "disk"}, quantization_config=config, **options
    )
    with pytest.raises(CodecError, match="made of a dense tensor, as accelerate does"):
        model(IDS)


class Hub(BaseHTTPRequestHandler):
    """The requests of `push_to_hub`, answered as the Hub does; uploaded files go to `folder`."""

    folder: Path

    def do_HEAD(self) -> None:
        self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        kind = self.path.partition("?")[0].removeprefix("/api/").rpartition("/main")[0]
        if self.path == "/api/repos/create":
            self.answer(200, {"url": f"http://{self.headers['Host']}/someone/model"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif kind == "models/someone/model/preupload":
            how = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": file["path"], **how} for file in json.loads(body)["files"]]
            self.answer(200, {"files": files})
        elif kind == "models/someone/model/commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    contents = base64.b64decode(line["value"]["content"])
                    (self.folder / line["value"]["path"]).write_bytes(contents)
            url = f"http://{self.headers['Host']}/someone/model/commit/{'0' * 40}"
            self.answer(200, {"commitUrl": url, "commitOid": "0" * 40})
        else:
            self.answer(404, {})

    def answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Prints nothing."""


PUSH = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1]).push_to_hub("someone/model", token="hf_none")
"""


@pytest.mark.feature(
    GROUP, "`push_to_hub` of a model loaded encoded", "to a server here that answers as the Hub"
)
def test_push_to_hub(encoded: Path, tmp_path: Path) -> None:
    handler = type("Handler", (Hub,), {"folder": tmp_path})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **{key: text for key, text in os.environ.items() if key != "HF_HUB_OFFLINE"},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "NO_PROXY": "127.0.0.1",
        "HF_HOME": str(tmp_path / "home"),
    }
    try:
        run = subprocess.run(
            [sys.executable, "-c", PUSH, encoded],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert run.returncode == 0, run.stderr[-2000:]
    assert "transformers" in (tmp_path / "README.md").read_text()
    pushed = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert pushed.lm_head.weight is pushed.model.embed_tokens.weight
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(encoded)(IDS).logits
        assert torch.equal(pushed(IDS).logits, expected)


SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}


def bert() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    return BertModel(BertConfig(vocab_size=512, **SMALL)), {"input_ids": IDS}


def vit() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    model = ViTModel(ViTConfig(image_size=32, patch_size=8, **SMALL))
    return model, {"pixel_values": torch.ones(1, 3, 32, 32)}


def clip() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    text = {"vocab_size": 512, "max_position_embeddings": 16, "eos_token_id": 300, **SMALL}
    vision = {"image_size": 32, "patch_size": 8, **SMALL}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    return model, {"input_ids": IDS, "pixel_values": torch.ones(1, 3, 32, 32)}


def whisper() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    config = WhisperConfig(
        vocab_size=512,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    return WhisperForConditionalGeneration(config), {"input_features": torch.ones(1, 16, 64)}


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(build, id=name, marks=pytest.mark.feature(GROUP, feature, "random weights"))
        for name, build, feature in (
            ("bert", bert, "encoders: BERT, by `AutoModel`"),
            ("vit", vit, "vision: ViT, by `AutoModel`"),
            ("whisper", whisper, "speech: Whisper, `generate`"),
        )
    ],
)
def test_other_models(
    build: Callable[[], tuple[PreTrainedModel, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    source, inputs = build()
    source.save_pretrained(tmp_path / "dense")
    kind = AutoModelForSpeechSeq2Seq if source.can_generate() else AutoModel
    config = TorchAoConfig(codec_weight_only("ectcq", bits=6, preset="fast"))
    model = kind.from_pretrained(tmp_path / "dense", quantization_config=config).eval()
    count = sum(isinstance(weight, CodecTensor) for weight in model.parameters())
    assert count >= 12, "of two layers at least"
    model.save_pretrained(tmp_path / "encoded")
    again = kind.from_pretrained(tmp_path / "encoded").eval()
    assert sum(isinstance(weight, CodecTensor) for weight in again.parameters()) == count
    with torch.no_grad():
        expected, got = model(**inputs, **extra(model)), again(**inputs, **extra(model))
        assert torch.equal(got[0], expected[0])
        assert snr_db(source.eval()(**inputs, **extra(model))[0], got[0]) > 15
        if source.can_generate():
            options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
            assert torch.equal(
                again.generate(**inputs, **options), model.generate(**inputs, **options)
            )


@pytest.mark.feature(
    GROUP, "vision and text: CLIP, by `compress` and `AutoModel`", "random weights"
)
def test_clip(tmp_path: Path) -> None:
    """Not with `TorchAoConfig`: docs/upstream.md."""
    torch.manual_seed(0)
    source, inputs = clip()
    source.eval().save_pretrained(tmp_path / "dense")
    arguments = [str(tmp_path / "dense"), str(tmp_path / "out"), "--bits", "6", "--preset", "fast"]
    assert main(["compress", *arguments]) in (0, None)
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert isinstance(model.vision_model.encoder.layers[0].mlp.fc1.weight, CodecTensor)
    with torch.no_grad():
        expected, got = (m(**inputs).image_embeds for m in (source, model))
    assert snr_db(expected, got) > 15


def extra(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {"decoder_input_ids": IDS} if model.can_generate() else {}


def test_save_pretrained_of_what_quantize_encoded(tmp_path: Path) -> None:
    model = tiny_llama()
    quantize_(
        model, codec_weight_only(bits=6, preset="fast"), lambda module, name: "q_proj" in name
    )
    with pytest.raises(ValueError, match="To save a model that quantize_ encoded"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="To save a model that quantize_ encoded"):
        safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")


@pytest.mark.feature(GROUP, "`generate` with a static cache, compiled")
def test_generate_with_a_static_cache_compiled() -> None:
    model = tiny_llama(num_hidden_layers=1).eval()  # each layer takes seconds to compile
    quantize_(model, codec_weight_only("ectcq", bits=5, preset="fast"))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    ids = torch.tensor([[1, 5, 7, 300]])
    expected = model.generate(ids, **options)
    model.forward = torch.compile(model.forward, fullgraph=True)
    compiled = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(compiled, expected)


def test_smollm2_is_an_ordinary_dense_model() -> None:
    """From a GGUF file, which newer versions of transformers take for a quantized model."""
    model, tokenizer = load_smollm2(torch.bfloat16)
    assert type(model.lm_head) is nn.Linear
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert getattr(model.config, "quantization_config", None) is None
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        following = model.float()(tokens).logits[0, -1].argmax()
    assert tokenizer.decode(following).strip() == "Paris"
