"""Calibrated compression of a checkpoint with one block in memory at a time: time and peak memory.

    python benchmarks/block_calibration.py --folder /tmp/blocks --json out.json

The checkpoint is shaped as TinyLlama 1.1B, of as many layers as make `--gigabytes` of bfloat16, of
normal numbers (`streaming.py`), and the text is of random words. Both tell nothing of quality:
`calibration.py` does. `--perplexity` measures SmolLM2-135M instead: at `--bits` on WikiText-2, what
`compress --calibrate self` wrote, and the same encoded by `calibrate` with the model in memory.
"""

import json
import random
from pathlib import Path
from typing import Any

from common import machine, parser, write
from streaming import Shape, draw, measured, program

from torchcodec_weights import calibrate, codec_weight_only, quantize_
from torchcodec_weights.evaluation.data import WIKITEXT2, data_file
from torchcodec_weights.evaluation.models import encoded_weights, load_by_name, load_smollm2
from torchcodec_weights.evaluation.perplexity import text_perplexity
from torchcodec_weights.models.huggingface import decompress_model

SHAPE = Shape(hidden=2048, intermediate=5632, keys=256, head=64)
WORDS = 511
"""Of a sequence, after its first token."""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, required=True, help="gets model and outputs")
    options.add_argument("--gigabytes", type=float, default=1.2, help="default: 1.2")
    options.add_argument("--sequences", type=int, default=2, help="of 512 tokens (default: 2)")
    options.add_argument("--bits", type=float, default=2.0, help="default: 2")
    options.add_argument("--preset", default="fast", help="default: fast")
    options.add_argument("--perplexity", action="store_true")
    options.add_argument("--tokens", type=int, default=4092, help="of WikiText-2")
    args = options.parse_args()
    args.folder.mkdir(exist_ok=True)
    results: dict[str, Any] = {"machine": machine(), "bits": args.bits, "preset": args.preset}
    write(args.json, results | (quality(args) if args.perplexity else memory(args)))


def memory(args: Any) -> dict[str, Any]:
    """Peak memory and time."""
    model, layers = args.folder / "model", SHAPE.layers(args.gigabytes)
    if not (model / "config.json").exists():
        draw(model, SHAPE, layers)
        save_tokenizer(model)
    text = args.folder / "text.txt"
    rng = random.Random(0)
    words = [f"w{rng.randrange(SHAPE.vocabulary - 3)}" for _ in range(args.sequences * WORDS)]
    text.write_text(" ".join(words))
    weights = layers * SHAPE.layer_weights()
    stored = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    command = ["--bits", args.bits, "--preset", args.preset]
    return {
        "layers": layers,
        "tokens": args.sequences * (WORDS + 1),
        "encoded_weights": weights,
        "model_bytes": stored,
        "float32_bytes": 2 * stored,
        "calibrated": measured(
            [program("compress", model, args.folder / "one", *command, "--calibrate", text)],
            weights,
        ),
    }


def save_tokenizer(folder: Path) -> None:
    """One token for each word of `memory`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(SHAPE.vocabulary - 3))]
    vocabulary = {name: number for number, name in enumerate(names)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def quality(args: Any) -> dict[str, Any]:
    """Perplexity of SmolLM2-135M by the two ways, which use the same text."""
    folder, out = args.folder / "smollm2", args.folder / "smollm2-encoded"
    if not (folder / "config.json").exists():
        model, tokenizer = load_smollm2()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    text = data_file(WIKITEXT2).read_text(encoding="utf-8")
    command = program(
        "compress",
        folder,
        out,
        *("--bits", args.bits, "--preset", args.preset, "--calibrate", "self"),
    )
    found: dict[str, Any] = {"tokens": args.tokens}
    weights = sum(weight.numel() for weight in encoded_weights(load_smollm2()[0]).values())
    found["compress"] = measured([command], weights)
    found["dense"] = text_perplexity(*load_by_name(str(folder)), text, args.tokens)
    found["by_blocks"] = text_perplexity(*load_by_name(str(out)), text, args.tokens)
    model, tokenizer = load_by_name(str(folder))
    config = codec_weight_only("ectcq", args.bits, preset=args.preset)
    names = encoded_weights(model).keys()
    quantize_(model, calibrate(model, config, lambda module, name: f"{name}.weight" in names))
    found["in_memory"] = text_perplexity(decompress_model(model), tokenizer, text, args.tokens)
    listed = json.loads((out / ".torchcodec_weights.json").read_text())["weights"]
    found["encoded"] = sum(entry["decoded_sha256"] != "" for entry in listed.values())
    return found


if __name__ == "__main__":
    main()
