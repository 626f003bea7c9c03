"""Perplexity of SmolLM2-135M with its embedding encoded, which is its output layer too.

    python benchmarks/embedding.py --json benchmarks/results/embedding.json

All other weights stay dense, so that what is seen is the embedding's part. Rates are chosen on
tokens 60,000 on, and reported on the first ones.
"""

import torch
from common import machine, parser, write
from tqdm.auto import tqdm

from torchcodec_weights import CodecTensor, codec_weight_only
from torchcodec_weights.evaluation.data import WIKITEXT2, data_file
from torchcodec_weights.evaluation.models import load_smollm2
from torchcodec_weights.evaluation.perplexity import perplexity
from torchcodec_weights.evaluation.rows import Row

BITS = (3, 4, 5, 6)  # with `ectcq` this matrix reaches 6.7
CHOSEN_FROM = 60_000


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=8192)
    args = options.parse_args()
    model, tokenizer = load_smollm2()
    text = data_file(WIKITEXT2).read_text()
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    texts = {"first": ids[: args.tokens], "chosen": ids[CHOSEN_FROM:][: args.tokens]}
    weight = model.get_input_embeddings().weight
    assert weight is model.get_output_embeddings().weight
    dense = weight.detach().clone()
    rows: list[Row] = []
    for bits in tqdm((None, *BITS)):
        stored = 32.0
        if bits is not None:
            coded = CodecTensor.from_hp(dense, codec_weight_only("ectcq", bits=bits))
            stored = coded.bits_per_weight
            weight.data = coded.dequantize()
        found = {
            name: perplexity(model, text, tokenizer.bos_token_id, args.tokens)
            for name, text in texts.items()
        }
        rows.append({"bits": bits, "bits_per_weight": stored, "perplexity": found})
        tqdm.write(str(rows[-1]))
        write(args.json, {"machine": machine(), "tokens": args.tokens, "rows": rows})


if __name__ == "__main__":
    main()
