"""diffusers: load with its TorchAoConfig, save, load again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import snr_db

from torchcodec_weights import CodecTensor, codec_weight_only

diffusers = pytest.importorskip("diffusers")
GROUP = "diffusers, sentence-transformers, timm"


def unet() -> tuple[torch.nn.Module, dict[str, object]]:
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=64,
        attention_head_dim=8,
    )
    inputs = {"sample": torch.ones(1, 4, 8, 8), "encoder_hidden_states": torch.ones(1, 3, 64)}
    return model, {**inputs, "timestep": 3}


def transformer() -> tuple[torch.nn.Module, dict[str, object]]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=8,
    )
    inputs = {
        "hidden_states": torch.ones(1, 4, 8, 8),
        "encoder_hidden_states": torch.ones(1, 3, 64),
    }
    return model, {**inputs, "pooled_projections": torch.ones(1, 64), "timestep": torch.tensor([3])}


@pytest.mark.feature(
    GROUP,
    "diffusers: `from_pretrained` with `TorchAoConfig`, saved, loaded: UNet, SD3's transformer",
)
@pytest.mark.parametrize("build", [unet, transformer])
def test_load_save_load(
    build: Callable[[], tuple[torch.nn.Module, dict[str, object]]], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    source, inputs = build()
    source.eval().save_pretrained(tmp_path / "dense")
    kind = type(source)
    config = diffusers.TorchAoConfig(codec_weight_only("ectcq", bits=6, preset="fast"))
    model = kind.from_pretrained(
        tmp_path / "dense", quantization_config=config, torch_dtype=torch.float32
    ).eval()
    count = sum(isinstance(weight, CodecTensor) for weight in model.parameters())
    assert count > 10
    with torch.no_grad():
        expected = model(**inputs).sample
        assert snr_db(source(**inputs).sample, expected) > 15
        model.save_pretrained(tmp_path / "encoded")
        again = kind.from_pretrained(tmp_path / "encoded", torch_dtype=torch.float32).eval()
        assert sum(isinstance(weight, CodecTensor) for weight in again.parameters()) == count
        assert torch.equal(again(**inputs).sample, expected)
