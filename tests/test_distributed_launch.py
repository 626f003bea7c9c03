"""`accelerate launch` of a program with an encoded model, in two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_llama

from torchcodec_weights import codec_weight_only, quantize_
from torchcodec_weights.models.huggingface import save_compressed

# What `accelerate config` writes for FSDP2, here for CPUs.
CONFIGURATION = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: false
  fsdp_offload_params: false
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_version: 2
main_process_port: 0
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: true
"""
# The norms of an encoded model train, alone and sharded.
PROGRAM = """
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM

from torchcodec_weights import CodecTensor


def opened():
    model = AutoModelForCausalLM.from_pretrained("model")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.SGD(trained, lr=0.5)


def train(model, optimizer):
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
# If this changes, docs/upstream_parallel.md has a paragraph too many.
assert accelerator.distributed_type == DistributedType.MULTI_CPU
accelerator.state.distributed_type = DistributedType.FSDP
accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # by the launcher's environment
assert accelerator.is_fsdp2

ids = torch.randint(3, 512, (2, 32), generator=torch.Generator().manual_seed(0))
model, optimizer = opened()
whole = model.model.layers[0].mlp.up_proj.weight.stored_bytes
alone = train(model, optimizer)
assert alone[2] < alone[0]
model, optimizer = accelerator.prepare(*opened())
part = model.model.layers[0].mlp.up_proj.weight.to_local()
assert isinstance(part, CodecTensor)
assert part.stored_bytes < 0.6 * whole
torch.testing.assert_close(train(model, optimizer), alone, rtol=1e-5, atol=0)
print(f"rank {accelerator.process_index} of {accelerator.num_processes} trained")
accelerator.end_training()
"""


def launch(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` of `program.py` in a folder."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "program.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.feature(
    "Parallelism, over two gloo processes",
    "`accelerate launch`: FSDP2 by a configuration file",
    "an encoded model of transformers; on CPUs as `Accelerator.prepare` above",
)
def test_fsdp2_by_a_configuration_file(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    config = codec_weight_only(
        bits=4, preset="fast", tile_shape=(128, 128)
    )  # two tiles of 256 rows
    quantize_(model, config)
    save_compressed(model, tmp_path / "model", config, embeddings=False)
    (tmp_path / "fsdp.yaml").write_text(CONFIGURATION)
    (tmp_path / "program.py").write_text(PROGRAM)
    done = launch(tmp_path, "--config_file", "fsdp.yaml")
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in (0, 1):
        assert f"rank {rank} of 2 trained" in done.stdout


def test_the_option_for_cpus_starts_one_process(tmp_path: Path) -> None:
    """If this changes, docs/upstream_parallel.md has a paragraph too many."""
    (tmp_path / "program.py").write_text(
        "from accelerate import Accelerator\nprint(Accelerator().num_processes)\n"
    )
    done = launch(tmp_path, "--cpu", "--num_processes", "2")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["1"]
