"""Tokens per second of SmolLM2-135M with compressed weights, in each form of `resident`.

    python benchmarks/generate.py --json benchmarks/results/generate.json

One token at a time, greedy, with a cache of keys and values; dense and compressed in turns, so that
all see the same machine. Presets are the fastest, as decoding takes the same time in all. All
Linear weights but `lm_head` are encoded; with "head too" it is as well, with the embedding that it
is tied to, at `--head-bits`, and with "head int8" it is resident so. Rates are medians over the
turns, ratios are medians of the turns' ratios to dense. Bytes are those of the bitstreams, of what
is resident beside them, and of the parameters that are not encoded.
"""

import copy
import json
import statistics
from typing import Any

import torch
from common import fastest_preset, machine, parser, tokens_per_second, write
from torchao.quantization import FqnToConfig
from tqdm.auto import trange

from torchcodec_weights import codec_weight_only, compression_report, quantize_, resident
from torchcodec_weights.evaluation.models import encoded_weights, load_smollm2


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--codec", default="ectcq")
    options.add_argument("--bits", type=float, default=3)
    options.add_argument("--head-bits", type=float, default=6)
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--turns", type=int, default=5)
    args = options.parse_args()
    dense, tokenizer = load_smollm2()
    models = {"dense": dense}
    for form in FORMS:
        models[form] = encoded_model(dense, form, args.codec, args.bits, args.head_bits)
    prompt = tokenizer("The history of the city begins", return_tensors="pt").input_ids
    rates: dict[str, list[float]] = {name: [] for name in models}
    for _ in trange(args.turns, desc="turns"):
        for name, model in models.items():
            rates[name].append(tokens_per_second(model, prompt, args.tokens))
    rows = [_row(name, model, rates[name], rates["dense"]) for name, model in models.items()]
    for row in rows:
        print(json.dumps(row))
    results: dict[str, Any] = {
        "codec": args.codec,
        "bits": args.bits,
        "head_bits": args.head_bits,
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    write(args.json, results)


FORMS = ("bits", "bits, head too", "bits, head int8", "int8", "int8, head too")


def encoded_model(dense: Any, form: str, codec: str, bits: float, head_bits: float) -> Any:
    """A copy of SmolLM2, encoded, in one of `FORMS`."""
    preset = fastest_preset(codec)
    model = copy.deepcopy(dense)
    config = codec_weight_only(codec, bits=bits, preset=preset)
    quantize_(model, FqnToConfig(dict.fromkeys(encoded_weights(model), config)))
    if "head" in form:
        head = codec_weight_only(codec, bits=head_bits, preset=preset)
        tied = dict.fromkeys(("lm_head.weight", "model.embed_tokens.weight"), head)
        quantize_(model, FqnToConfig(tied))
    if form.startswith("int8"):
        resident(model, "int8")
    elif form.endswith("int8"):
        resident(model.lm_head, "int8")
    return model


def _row(name: str, model: Any, rates: list[float], dense: list[float]) -> dict[str, Any]:
    report = compression_report(model)
    ratios = [rate / other for rate, other in zip(rates, dense, strict=True)]
    return {
        "form": name,
        "tokens_per_second": statistics.median(rates),
        "of_dense": statistics.median(ratios),
        "stored_bytes": report.stored_bytes,
        "resident_bytes": report.resident_bytes,
        "other_bytes": report.other_bytes,
    }


if __name__ == "__main__":
    main()
