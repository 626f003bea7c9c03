"""timm: a small vision transformer and a convolutional network, in a process of their own.

timm imports torchvision, whose builds on PyPI are for CUDA: beside a PyTorch for the CPU their
operators are missing, and the import fails. timm's models call none of them, so they are declared
here, without kernels. `make` installs both packages in a folder of their own, as transformers
imports every torchvision that it finds.
"""

import importlib
import multiprocessing
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import snr_db
from torch import nn

from torchcodec_weights import CodecTensor, codec_weight_only, load_file, quantize_, save_file

GROUP = "diffusers, sentence-transformers, timm"
APART = Path(sys.prefix) / "timm"
MODELS: dict[str, dict[str, int]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 96},
    "resnet18": {"num_classes": 10},
}


@pytest.mark.feature(
    GROUP, "timm: a vision transformer, a ResNet with its convolutions", "random weights"
)
@pytest.mark.skipif(
    find_spec("timm") is None and not APART.is_dir(),
    reason=f"timm is not installed, nor in {APART}",
)
def test_encoded_and_loaded_again(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=encode_and_load_again, args=(tmp_path / "model.safetensors",)
    )
    process.start()
    process.join()
    assert process.exitcode == 0  # it printed its error


def import_timm() -> Any:
    """timm where it is installed; otherwise that of `APART`, with the operators declared."""
    if find_spec("timm") is None:
        sys.path.append(str(APART))
        if torch.version.cuda is None:
            for operator in ("nms", "qnms"):
                torch.library.define(
                    f"torchvision::{operator}",
                    "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                )
    return importlib.import_module("timm")


@torch.no_grad()
def encode_and_load_again(file: Path) -> None:
    timm = import_timm()
    x = torch.ones(1, 3, 32, 32)
    for name, options in MODELS.items():
        torch.manual_seed(0)
        model = timm.create_model(name, **options).eval()
        dense = model(x)
        quantize_(
            model,
            codec_weight_only("ectcq", bits=6, preset="fast"),
            lambda module, path: isinstance(module, nn.Linear | nn.Conv2d) and "layer4" not in path,
        )
        assert sum(isinstance(weight, CodecTensor) for weight in model.parameters()) > 8
        encoded = model(x)
        assert snr_db(dense, encoded) > 15
        save_file(model.state_dict(), file)
        fresh = timm.create_model(name, **options).eval()
        fresh.load_state_dict(load_file(file), assign=True)
        assert torch.equal(fresh(x), encoded)
