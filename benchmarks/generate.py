"""Tokens per second of SmolLM2-135M with compressed weights that are decoded at every use.

    python benchmarks/generate.py --json benchmarks/results/generate.json

One token at a time, greedy, with a cache of keys and values; dense and compressed in turns, so that
both see the same machine. Weights in memory are the bytes of all inner tensors of the CodecTensors.
"""

import copy
import json
import statistics
import time
from typing import Any

import torch
from common import machine, parser, write
from torchao.quantization import FqnToConfig
from tqdm.auto import trange

from torchcodec_weights import codec_weight_only, compression_report, quantize_
from torchcodec_weights.evaluation.models import encoded_weights, load_smollm2


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--codec", default="ectcq")
    options.add_argument("--bits", type=float, default=3)
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--turns", type=int, default=5)
    args = options.parse_args()
    dense, tokenizer = load_smollm2()
    compressed = copy.deepcopy(dense)
    config = codec_weight_only(args.codec, bits=args.bits)
    quantize_(compressed, FqnToConfig(dict.fromkeys(encoded_weights(compressed), config)))
    report = compression_report(compressed)
    prompt = tokenizer("The history of the city begins", return_tensors="pt").input_ids
    rates: dict[str, list[float]] = {"dense": [], "compressed": []}
    for _ in trange(args.turns, desc="turns"):
        rates["dense"].append(_rate(dense, prompt, args.tokens))
        rates["compressed"].append(_rate(compressed, prompt, args.tokens))
    row: dict[str, Any] = {
        "codec": args.codec,
        "bits": args.bits,
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "weight_bytes": report.stored_bytes,
        "weight_bytes_over_asked": report.bits_per_weight / args.bits,
    }
    print(json.dumps(row, indent=1))
    write(args.json, row)


@torch.inference_mode()
def _rate(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    model.generate(prompt, max_new_tokens=2, do_sample=False, pad_token_id=0)
    start = time.perf_counter()
    new = model.generate(
        prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    assert new.shape[1] == prompt.shape[1] + tokens
    return tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
