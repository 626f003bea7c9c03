"""Search by meaning with an encoder at 4 bits per weight, beside the dense one.

    python examples/search.py "an animal that sleeps all day"

The encoder is all-MiniLM-L6-v2.
"""

import argparse
import copy

from torchcodec_weights import codec_weight_only, compression_report, quantize_
from torchcodec_weights.evaluation.models import load_minilm
from torchcodec_weights.evaluation.sts import sentence_embeddings

SENTENCES = [
    "The cat has not left the sofa since breakfast.",
    "Trains to the coast leave every hour from platform two.",
    "The bank raised its interest rate by half a percent.",
    "We fished from the bank of the river until dark.",
    "Bake the bread for forty minutes in a hot oven.",
    "The orchestra played a symphony by Sibelius.",
    "Her new telescope shows the rings of Saturn.",
    "The vaccine was tested on thirty thousand volunteers.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("query", nargs="?", default="an animal that sleeps all day")
    parser.add_argument("--bits", type=float, default=4)
    args = parser.parse_args()

    dense, tokenizer = load_minilm()
    encoded = copy.deepcopy(dense)
    quantize_(encoded, codec_weight_only(bits=args.bits, preset="fast"))
    print(compression_report(encoded).totals)

    similar = {}
    for name, model in {"dense": dense, "encoded": encoded}.items():
        # Unit vectors, so that a product is the cosine of two.
        query, *rows = sentence_embeddings(model, tokenizer, [args.query, *SENTENCES])
        similar[name] = [float(row @ query) for row in rows]
    print(f"\n{args.query!r}\n\n  encoded  dense")
    order = sorted(range(len(SENTENCES)), key=lambda index: -similar["encoded"][index])
    for index in order:
        scores = f"{similar['encoded'][index]:9.3f}{similar['dense'][index]:7.3f}"
        print(f"{scores}  {SENTENCES[index]}")


if __name__ == "__main__":
    main()
