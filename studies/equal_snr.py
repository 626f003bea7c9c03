"""Does a codec's error cost SmolLM2-135M more than other error of the same size, and why?

    python studies/equal_snr.py vvc/faster:2 --json studies/results/equal_snr.json

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
from pathlib import Path

import torch
from normalization import normalizer
from smollm2 import SmolLM2
from torch import Tensor

from torchcodec_weights import codec_weight_only
from torchcodec_weights.encoder.encode import Normalizer
from torchcodec_weights.evaluation.recoding import recode
from torchcodec_weights.evaluation.rows import Row, Rows
from torchcodec_weights.evaluation.snr import snr_db
from torchcodec_weights.matrix.normalize import normalize

OUTLIERS = 5.0  # of the video codecs
Weights = dict[str, Tensor]


class Coded:
    """SmolLM2, and what a codec made of its weights."""

    def __init__(self, method: str, preset: str, tokens: int) -> None:
        self.model = SmolLM2(tokens)
        self.dense = self.model.dense
        name, _, bits = method.partition(":")
        self.codec, _, own = name.partition("/")
        self.bits, self.own_preset = float(bits), own or None
        self.preset = preset
        self.coded: tuple[float, Weights] | None = None

    def measure(self, what: str) -> Row:
        stored, decoded = self._decoded(what)
        return {
            "bits_per_weight": stored,
            "snr_db": snr_db((weight, decoded[name]) for name, weight in self.dense.items()),
            "perplexity": self.model.perplexity(decoded),
        }

    def _decoded(self, what: str) -> tuple[float, Weights]:
        if what in ("own", "white", "ectcq"):
            self.coded = self.coded or self._encode(self.dense)
            stored, decoded = self.coded
            if what == "own":
                return self.coded
            if what == "white":
                dense = enumerate(self.dense.items())
                return stored, {n: _thrown(w, decoded[n], index) for index, (n, w) in dense}
            plan = {
                name: codec_weight_only(
                    "ectcq", snr_db=snr_db([(weight, decoded[name])]) - 0.1, preset=self.preset
                )
                for name, weight in self.dense.items()
            }
            return recode(self.dense, plan)
        if what == "nosigns":
            return self._encode(self.dense, normalized=normalizer("nosigns"))
        if what == "permuted":
            generator = torch.Generator().manual_seed(0)
            order = {
                n: torch.randperm(w.shape[1], generator=generator) for n, w in self.dense.items()
            }
            moved = {n: w[:, order[n]].contiguous() for n, w in self.dense.items()}
            stored, decoded = self._encode(moved)
            return stored, {n: w[:, order[n].argsort()] for n, w in decoded.items()}
        key, _, value = what.partition("=")
        return self._encode(self.dense, {key: value})

    def _encode(
        self,
        weights: Weights,
        encoder_params: dict[str, str] | None = None,
        normalized: Normalizer = normalize,
    ) -> tuple[float, Weights]:
        config = codec_weight_only(
            self.codec, self.bits, preset=self.own_preset, encoder_params=encoder_params
        )
        return recode(weights, dict.fromkeys(weights, config), normalizer=normalized)


def _thrown(weight: Tensor, decoded: Tensor, seed: int) -> Tensor:
    z = torch.from_numpy(normalize(weight.numpy(), OUTLIERS).z)
    kept = z != 0  # outliers are exact
    scales = weight[kept] / z[kept]
    got = decoded[kept] / scales
    factor = (got @ z[kept]) / (z[kept] @ z[kept])
    rest = got - factor * z[kept]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
    result = decoded.clone()
    result[kept] = (factor * z[kept] + rest[order]) * scales
    return result


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
    rows = Rows(args.json)
    for method in args.methods:
        coded: Coded | None = None
        for what in args.what:
            key = {"method": method, "what": what, "tokens": args.tokens}
            row = rows.find(key)
            if row is None:
                coded = coded or Coded(method, args.preset, args.tokens)
                row = key | coded.measure(what)
                rows.add(row)
            print(
                f"{method:14} {what:16} {row['bits_per_weight']:.3f} bits, {row['snr_db']:.2f} dB, "
                f"perplexity {row['perplexity']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
