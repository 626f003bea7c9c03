"""timm: a small vision transformer and a convolutional network."""

from pathlib import Path

import pytest
import torch
from conftest import snr_db
from torch import nn

from torchcodec_weights import CodecTensor, codec_weight_only, load_file, quantize_, save_file

GROUP = "diffusers, sentence-transformers, timm"
REASON = (
    "timm needs a torchvision built for the PyTorch that is here; PyPI's is for CUDA, and beside "
    "PyTorch for the CPU raises 'operator torchvision::nms does not exist'"
)


@pytest.mark.feature(
    GROUP,
    "timm: a vision transformer, a ResNet with its convolutions",
    "needs a torchvision built for the PyTorch that is here",
)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 96}),
        ("resnet18", {"num_classes": 10}),
    ],
)
def test_encoded_and_loaded_again(name: str, options: dict[str, int], tmp_path: Path) -> None:
    # In no extra, as transformers imports a torchvision that is installed, and would fail too.
    timm = pytest.importorskip("timm", reason=REASON)
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    x = torch.ones(1, 3, 32, 32)
    with torch.no_grad():
        dense = model(x)
        quantize_(
            model,
            codec_weight_only("ectcq", bits=6, preset="fast"),
            lambda module, path: isinstance(module, nn.Linear | nn.Conv2d) and "layer4" not in path,
        )
        assert sum(isinstance(weight, CodecTensor) for weight in model.parameters()) > 8
        encoded = model(x)
        assert snr_db(dense, encoded) > 15
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        fresh = timm.create_model(name, **options).eval()
        fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
        assert torch.equal(fresh(x), encoded)
