"""sentence-transformers: embeddings of MiniLM, encoded."""

from pathlib import Path

import pytest
import torch
from torchao.quantization import FqnToConfig
from transformers import TorchAoConfig

from torchcodec_weights import CodecTensor, codec_weight_only
from torchcodec_weights.evaluation.models import minilm_folder

sentence_transformers = pytest.importorskip("sentence_transformers")
GROUP = "diffusers, sentence-transformers, timm"
SENTENCES = ["A man is playing a guitar.", "Someone plays an instrument.", "It rains in Bergen."]


@pytest.mark.feature(GROUP, "sentence-transformers: MiniLM encoded, saved, loaded")
def test_minilm(tmp_path: Path) -> None:
    folder = str(minilm_folder())
    linear = codec_weight_only("ectcq", bits=4, preset="fast")
    # Of two layers, as encoding takes seconds.
    config = TorchAoConfig(
        FqnToConfig({r"re:encoder\.layer\.[01]\..*(query|key|value|dense)\.weight": linear})
    )
    options = {"device": "cpu", "local_files_only": True}
    dense = sentence_transformers.SentenceTransformer(folder, **options)
    model = sentence_transformers.SentenceTransformer(
        folder, model_kwargs={"quantization_config": config}, **options
    )
    count = sum(isinstance(weight, CodecTensor) for weight in model.parameters())
    assert count == 12
    embeddings = model.encode(SENTENCES, convert_to_tensor=True)
    alike = torch.cosine_similarity(embeddings, dense.encode(SENTENCES, convert_to_tensor=True))
    assert alike.min() > 0.98
    pairs = model.similarity(embeddings, embeddings)
    assert pairs[0, 1] > pairs[0, 2] + 0.2
    model.save(str(tmp_path))
    again = sentence_transformers.SentenceTransformer(str(tmp_path), **options)
    assert sum(isinstance(weight, CodecTensor) for weight in again.parameters()) == count
    assert torch.equal(again.encode(SENTENCES, convert_to_tensor=True), embeddings)
