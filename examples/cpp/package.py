"""Package a model with encoded weights for generate.cpp, and turn its answers into text.

    python package.py make --folder out --prompt "The capital of France is" --tokens 32
    build/generate out/model.pt2 out/prompt.txt 32 LIBRARY > out/answer.txt
    python package.py compare out

`make` writes model.pt2, an AOTInductor package; prompt.txt, the ids of the prompt's tokens,
separated by spaces; and expected.txt, the ids that the same model generates in Python. `compare`
prints the answer as text, and says whether it is the same.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchcodec_weights
from torchcodec_weights.evaluation.models import load_smollm2


class Step(nn.Module):
    """One token in, the logits of the next out; keys and values stay in buffers."""

    def __init__(self, model: Any, length: int) -> None:
        super().__init__()
        config = model.config
        self.model, self.length = model, length
        size = config.hidden_size // config.num_attention_heads
        for name in self._names():
            empty = torch.zeros(1, config.num_key_value_heads, length, size, dtype=model.dtype)
            self.register_buffer(name, empty, persistent=False)

    def _names(self) -> list[str]:
        layers = range(self.model.config.num_hidden_layers)
        return [f"{kind}_{layer}" for layer in layers for kind in ("keys", "values")]

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        """The logits (vocabulary,) after `token` (1, 1) at `position` (1,), both int64."""
        from transformers import StaticCache

        cache = StaticCache(config=self.model.config, max_cache_len=self.length)
        buffers = iter(self._names())
        for layer in cache.layers:
            layer.keys, layer.values = (getattr(self, next(buffers)) for _ in range(2))
            layer.cumulative_length = position[0].clone()
            layer.device, layer.is_initialized = token.device, True
        out = self.model(
            input_ids=token, position_ids=position[None], past_key_values=cache, use_cache=True
        )
        logits: Tensor = out.logits[0, -1]
        return logits


def encode(model: nn.Module, bits: float, preset: str) -> None:
    """Encode the Linear weights, those that are tied to the input embedding left out."""
    config = torchcodec_weights.codec_weight_only("ectcq", bits=bits, preset=preset)
    torchcodec_weights.quantize_(
        model, config, lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name
    )


def package(model: Any, prompt: list[int], tokens: int, folder: Path) -> None:
    """Write model.pt2, prompt.txt and expected.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    step = Step(model.eval(), len(prompt) + tokens)
    first = torch.tensor([prompt[:1]]), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        exported = torch.export.export(step, first, strict=False)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / "model.pt2"))
        ids, generated = list(prompt), []
        for position in range(len(prompt) + tokens - 1):
            logits = step(torch.tensor([[ids[position]]]), torch.tensor([position]))
            if position + 1 >= len(prompt):
                generated.append(int(logits.argmax()))
                ids.append(generated[-1])
    (folder / "prompt.txt").write_text(" ".join(map(str, prompt)) + "\n")
    (folder / "expected.txt").write_text(" ".join(map(str, generated)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make")
    make.add_argument("--folder", type=Path, required=True)
    make.add_argument("--prompt", default="The capital of France is")
    make.add_argument("--tokens", type=int, default=32)
    make.add_argument("--bits", type=float, default=3)
    compare = commands.add_parser("compare")
    compare.add_argument("folder", type=Path)
    args = parser.parse_args()
    model, tokenizer = load_smollm2()
    if args.command == "make":
        encode(model, args.bits, "fast")
        package(model, tokenizer(args.prompt).input_ids, args.tokens, args.folder)
        return
    answer, expected = (
        [int(word) for word in (args.folder / name).read_text().split()]
        for name in ("answer.txt", "expected.txt")
    )
    print(tokenizer.decode(answer))
    if answer != expected:
        sys.exit(f"Python generates {tokenizer.decode(expected)!r}")


if __name__ == "__main__":
    main()
