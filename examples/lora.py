"""LoRA on a 2-bit model: the weights stay bitstreams, and only the adapter is trained.

    python examples/lora.py

Encodes SmolLM2-135M-Instruct at 2 bits per weight, trains an adapter of peft on the start of
WikiText-2's test text, prints the loss of each step, and compares models on text after that. The
encoded model and the adapter are saved, and loaded again in a fresh process. Everything is left in
lora_output/.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, TorchAoConfig

from torchcodec_weights import codec_weight_only
from torchcodec_weights.evaluation.data import WIKITEXT2, data_file
from torchcodec_weights.evaluation.models import load_by_name

OUTPUT = Path("lora_output")
DENSE, BASE, ADAPTER = OUTPUT / "dense", OUTPUT / "base", OUTPUT / "adapter"
WINDOW = 128
BATCH = 4
HELD_OUT = 8  # windows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2", help="or a model's directory")
    parser.add_argument("--bits", type=float, default=2)
    parser.add_argument("--preset", default="fast", help="of ectcq")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--reload", action="store_true", help="only load what was saved")
    args = parser.parse_args()
    if args.reload:
        reload()
    else:
        train(args.model, args.bits, args.preset, args.steps)


def train(name: str, bits: float, preset: str, steps: int) -> None:
    model, tokenizer = load_by_name(name)
    windows = windows_of(tokenizer, HELD_OUT + steps * BATCH)
    held_out, batches = windows[:HELD_OUT], windows[HELD_OUT:].split(BATCH)
    print(f"dense: held-out loss {loss_of(model, held_out):.4f}")
    model.save_pretrained(DENSE)

    print(f"Encoding at {bits:g} bits per weight ...", flush=True)
    config = codec_weight_only("ectcq", bits=bits, preset=preset)
    base = AutoModelForCausalLM.from_pretrained(DENSE, quantization_config=TorchAoConfig(config))
    base.save_pretrained(BASE)
    torch.save(held_out.clone(), OUTPUT / "held_out.pt")
    print(f"encoded: held-out loss {loss_of(base, held_out):.4f}")

    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(f"Training {sum(map(torch.numel, trained)):,} numbers of the adapter ...", flush=True)
    losses = fit(model, trained, batches)
    draw(losses)
    print(f"with the adapter: held-out loss {loss_of(model, held_out):.4f}")
    model.save_pretrained(ADAPTER)
    for folder in (DENSE, BASE, ADAPTER):
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(f"{folder}: {size / 1e6:.1f} MB")
    print("Loading the encoded model and the adapter in a fresh process ...", flush=True)
    subprocess.run([sys.executable, __file__, "--reload"], check=True)


def windows_of(tokenizer: Any, count: int) -> Tensor:
    """The first tokens of the text, (windows, WINDOW)."""
    text = data_file(WIKITEXT2).read_text()
    tokens = tokenizer(text[: 8 * WINDOW * count], return_tensors="pt").input_ids[0]
    return tokens[: WINDOW * count].view(count, WINDOW)


def fit(model: Any, trained: list[Tensor], batches: tuple[Tensor, ...]) -> list[float]:
    """Train on each batch once; prints the loss of each step, in nats per token, as a bar."""
    optimizer = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0)
    model.train()
    losses = []
    for step, batch in enumerate(batches, 1):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step:3}  loss {losses[-1]:.4f}  {'#' * round(10 * losses[-1])}", flush=True)
    return losses


def loss_of(model: Any, windows: Tensor) -> float:
    """Mean cross entropy of windows in nats per token."""
    model.eval()
    with torch.no_grad():
        return float(model(input_ids=windows, labels=windows).loss)


def draw(losses: list[float]) -> None:
    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, marker=".")
    axes.set(xlabel="step", ylabel="loss in nats per token", title="LoRA on encoded weights")
    axes.grid(alpha=0.3)
    figure.savefig(OUTPUT / "loss.svg")


def reload() -> None:
    base = AutoModelForCausalLM.from_pretrained(BASE)
    model = PeftModel.from_pretrained(base, ADAPTER)
    held_out = torch.load(OUTPUT / "held_out.pt")
    print(f"loaded again: held-out loss {loss_of(model, held_out):.4f}")


if __name__ == "__main__":
    main()
