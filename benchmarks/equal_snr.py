"""Does a codec's error cost SmolLM2-135M more than ECTCQ's of the same size, layer by layer?

    python benchmarks/equal_snr.py vvc/faster:2 h264:2

Encodes all layers with a codec, then with `ectcq` to the SNR that each layer had, and prints both
perplexities.
"""

import argparse
from pathlib import Path

from torch import nn
from torchao.quantization import FqnToConfig

from torchcodec_weights import codec_weight_only, compression_report, decompress_, quantize_
from torchcodec_weights.evaluation.models import load_smollm2
from torchcodec_weights.evaluation.perplexity import perplexity

TEXT = Path(__file__).parent / "data" / "wikitext2-test.txt"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="+", help="CODEC[/PRESET]:BITS")
    parser.add_argument("--preset", default="fast", help="of ectcq")
    parser.add_argument("--tokens", type=int, default=4092)
    args = parser.parse_args()
    model, tokenizer = load_smollm2()
    ids = tokenizer(TEXT.read_text(), add_special_tokens=False, return_tensors="pt").input_ids[0]
    dense = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    for method in args.methods:
        name, _, bits = method.partition(":")
        codec, _, preset = name.partition("/")
        plan = dict.fromkeys(dense, codec_weight_only(codec, float(bits), preset=preset or None))
        for label in (method, f"ectcq/{args.preset}"):
            quantize_(model, FqnToConfig(plan))
            report = compression_report(model)
            plan = {
                row.name.removesuffix(".weight"): codec_weight_only(
                    "ectcq", snr_db=row.snr_db - 0.1, preset=args.preset
                )
                for row in report.weights
            }
            snr_db = sum(row.snr_db for row in report.weights) / len(report.weights)
            decompress_(model)
            print(
                f"{label:14} {report.bits_per_weight:.3f} bits, {snr_db:.2f} dB on average, "
                f"perplexity {perplexity(model, ids, tokenizer.bos_token_id, args.tokens):.2f}",
                flush=True,
            )
            for layer, weight in dense.items():
                model.get_submodule(layer).weight = weight


if __name__ == "__main__":
    main()
