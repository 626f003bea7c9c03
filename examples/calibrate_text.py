"""Calibrate with text of your own: the bits go where errors would harm predictions of that text.

    python examples/calibrate_text.py --model smollm2 --bits 2 --text my.txt

The first part of the text calibrates; perplexity is measured on what follows.
"""

import argparse
import copy
from pathlib import Path

import torch

from torchcodec_weights import calibrate, codec_weight_only, compression_report, quantize_
from torchcodec_weights.evaluation.data import WIKITEXT2, data_file
from torchcodec_weights.evaluation.models import load_smollm2, load_tiny
from torchcodec_weights.evaluation.perplexity import perplexity

MODELS = {"smollm2": load_smollm2, "tiny": load_tiny}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--bits", type=float, default=2)
    parser.add_argument("--text", type=Path, default=data_file(WIKITEXT2))
    parser.add_argument("--sequences", type=int, default=4, help="to calibrate with")
    parser.add_argument("--length", type=int, default=512, help="of a sequence, in tokens")
    args = parser.parse_args()

    model, tokenizer = MODELS[args.model]()
    ids = torch.tensor(tokenizer(args.text.read_text(), verbose=False).input_ids)
    count = args.sequences * args.length
    # One input per sequence: named arguments, as the model takes them.
    samples = [{"input_ids": row[None]} for row in ids[:count].split(args.length)]
    rest = ids[count : 3 * count]

    config = codec_weight_only(bits=args.bits, preset="fast")
    configs = {
        "the same bits everywhere": config,
        "calibrated with your text": calibrate(model, config, sample_inputs=samples),
    }
    start = tokenizer.bos_token_id
    print(f"perplexity on the next {len(rest)} tokens")
    print(f"  {'dense':<26}{perplexity(model, rest, start, len(rest)):12.1f}")
    for name, chosen in configs.items():
        encoded = copy.deepcopy(model)
        quantize_(encoded, chosen)
        value = perplexity(encoded, rest, start, len(rest))
        bits = compression_report(encoded).bits_per_weight
        print(f"  {name:<26}{value:12.1f} at {bits:.3f} bits per weight")


if __name__ == "__main__":
    main()
