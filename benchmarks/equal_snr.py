"""Does a codec's error cost SmolLM2-135M more than other error of the same size, and why?

    python benchmarks/equal_snr.py vvc/faster:2 --json benchmarks/results/equal_snr.json

Encodes all layers with a codec and prints the perplexity, and that of

- `white`: the same model with that error thrown about. In each normalized matrix the decoded weight
  is a multiple of the weight, less than one, plus a rest; the values of the rest change places.
  Size, correlation with the weight and distribution of the error stay, what goes is its structure;
- `ectcq`: each layer encoded by `ectcq` to the SNR that it had;
- `nosigns`, `permuted`: the codec without random signs, and with the columns in another order;
- `KEY=VALUE`: the codec with this encoder parameter.

Rows that the JSON file holds already are not measured again.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from normalization import varied
from torch import Tensor, nn
from torchao.quantization import FqnToConfig

from torchcodec_weights import (
    CodecWeightOnlyConfig,
    codec_weight_only,
    compression_report,
    decompress_,
    quantize_,
)
from torchcodec_weights import normalize as package
from torchcodec_weights.evaluation.models import load_smollm2
from torchcodec_weights.evaluation.perplexity import perplexity

TEXT = Path(__file__).parent / "data" / "wikitext2-test.txt"
OUTLIERS = 5.0  # of the video codecs
Weights = dict[str, Tensor]


class Bench:
    """SmolLM2, its text, and what a codec made of its weights."""

    def __init__(self, method: str, preset: str, tokens: int) -> None:
        self.model, tokenizer = load_smollm2()
        ids = tokenizer(TEXT.read_text(), add_special_tokens=False, return_tensors="pt").input_ids
        bos = tokenizer.bos_token_id
        self.perplexity: Callable[[], float] = lambda: perplexity(self.model, ids[0], bos, tokens)
        self.dense = {
            name: module.weight.detach()
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        }
        name, _, bits = method.partition(":")
        codec, _, own = name.partition("/")
        self.config = {"codec": codec, "bits": float(bits), "preset": own or None}
        self.preset = preset
        self.coded: tuple[float, Weights] | None = None

    def measure(self, what: str) -> dict[str, Any]:
        stored, decoded = self._decoded(what)
        error = sum(float((decoded[n] - w).double().square().sum()) for n, w in self.dense.items())
        energy = sum(float(w.double().square().sum()) for w in self.dense.values())
        self._put(decoded)
        return {
            "bits_per_weight": stored,
            "snr_db": 10 * float(np.log10(energy / error)),
            "perplexity": self.perplexity(),
        }

    def _decoded(self, what: str) -> tuple[float, Weights]:
        own = codec_weight_only(**self.config)
        if what in ("own", "white", "ectcq"):
            self.coded = self.coded or self._encode(self.dense, dict.fromkeys(self.dense, own))
        if what == "own":
            assert self.coded
            return self.coded
        if what == "white":
            assert self.coded
            stored, decoded = self.coded
            return stored, {
                n: _thrown(w, decoded[n], i) for i, (n, w) in enumerate(self.dense.items())
            }
        if what == "ectcq":
            assert self.coded
            snr_db = {n: _snr_db(w, self.coded[1][n]) for n, w in self.dense.items()}
            plan = {
                n: codec_weight_only("ectcq", snr_db=db - 0.1, preset=self.preset)
                for n, db in snr_db.items()
            }
            return self._encode(self.dense, plan)
        if what == "nosigns":
            with varied("nosigns", 0):
                return self._encode(self.dense, dict.fromkeys(self.dense, own))
        if what == "permuted":
            generator = torch.Generator().manual_seed(0)
            order = {
                n: torch.randperm(w.shape[1], generator=generator) for n, w in self.dense.items()
            }
            moved = {n: w[:, order[n]].contiguous() for n, w in self.dense.items()}
            stored, decoded = self._encode(moved, dict.fromkeys(self.dense, own))
            return stored, {n: w[:, order[n].argsort()] for n, w in decoded.items()}
        key, _, value = what.partition("=")
        changed = codec_weight_only(**self.config, encoder_params={key: value})
        return self._encode(self.dense, dict.fromkeys(self.dense, changed))

    def _encode(
        self, weights: Weights, plan: dict[str, CodecWeightOnlyConfig]
    ) -> tuple[float, Weights]:
        self._put(weights)
        quantize_(self.model, FqnToConfig(dict(plan)))
        stored = compression_report(self.model).bits_per_weight
        decompress_(self.model)
        return stored, {n: self.model.get_submodule(n).weight.detach() for n in weights}

    def _put(self, weights: Weights) -> None:
        for name, weight in weights.items():
            self.model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)


def _thrown(weight: Tensor, decoded: Tensor, seed: int) -> Tensor:
    z = torch.from_numpy(package.normalize(weight.numpy(), OUTLIERS).z)
    kept = z != 0  # outliers are exact
    scales = weight[kept] / z[kept]
    got = decoded[kept] / scales
    factor = (got @ z[kept]) / (z[kept] @ z[kept])
    rest = got - factor * z[kept]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
    result = decoded.clone()
    result[kept] = (factor * z[kept] + rest[order]) * scales
    return result


def _snr_db(weight: Tensor, decoded: Tensor) -> float:
    return float(10 * torch.log10(weight.square().sum() / (weight - decoded).square().sum()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="+", help="CODEC[/PRESET]:BITS")
    parser.add_argument(
        "--what", nargs="+", default=["own", "white", "ectcq", "nosigns", "permuted"]
    )
    parser.add_argument("--preset", default="fast", help="of ectcq")
    parser.add_argument("--tokens", type=int, default=4092)
    parser.add_argument("--json", type=Path, help="rows are read from there and written to it")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if args.json and args.json.exists():
        rows = json.loads(args.json.read_text())
    for method in args.methods:
        bench: Bench | None = None
        for what in args.what:
            key = {"method": method, "what": what, "tokens": args.tokens}
            row = next((r for r in rows if key.items() <= r.items()), None)
            if row is None:
                bench = bench or Bench(method, args.preset, args.tokens)
                row = key | bench.measure(what)
                rows.append(row)
                if args.json:
                    args.json.write_text(json.dumps(rows, indent=1) + "\n")
            print(
                f"{method:14} {what:16} {row['bits_per_weight']:.3f} bits, {row['snr_db']:.2f} dB, "
                f"perplexity {row['perplexity']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
