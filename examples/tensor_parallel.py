"""Tensor parallelism on two processes, which share the feed-forward layers of a language model.

    python examples/tensor_parallel.py --model smollm2

Both run on this machine, over gloo. On several, start the processes with torchrun.
"""

import argparse
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, parallel

from torchcodec_weights import codec_weight_only, quantize_
from torchcodec_weights.evaluation.models import load_smollm2, load_tiny

MODELS = {"smollm2": load_smollm2, "tiny": load_tiny}
by_rows, by_cols = parallel.ColwiseParallel(), parallel.RowwiseParallel()  # of the weight
PLAN = {"gate_proj": by_rows, "up_proj": by_rows, "down_proj": by_cols}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    args = parser.parse_args()
    model, tokenizer = MODELS[args.model]()
    quantize_(model, codec_weight_only(bits=3, preset="fast"))
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (f"file://{folder}/meeting", model, prompt), nprocs=2)


@torch.no_grad()
def process(rank: int, meeting: str, model: Any, prompt: torch.Tensor) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", meeting, rank=rank, world_size=2)
    alone = model(prompt).logits
    before, mesh = feed_forward_bytes(model), init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        parallel.parallelize_module(layer.mlp, mesh, PLAN)
    difference = float((model(prompt).logits - alone).abs().max())
    print(
        f"process {rank} has {feed_forward_bytes(model):,} bytes of {before:,} of the feed-forward "
        f"layers; logits differ by {difference:.1e} from those of one process",
        flush=True,
    )
    dist.destroy_process_group()


def feed_forward_bytes(model: Any) -> int:
    """Stored bytes of what this process holds of them."""
    weights = [weight for layer in model.model.layers for weight in layer.mlp.parameters()]
    held = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    return sum(weight.stored_bytes for weight in held)


if __name__ == "__main__":
    main()
