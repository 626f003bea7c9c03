"""What `calibrate` gains over the same bits for every layer, row and column.

    python benchmarks/calibration.py --json benchmarks/results/calibration.json
    python benchmarks/calibration.py --models minilm --bits 1.5 2 --seeds 0 1 2 3 4 5 6 7 8 9 \\
        --json benchmarks/results/calibration.json

Rows that the JSON file holds already are not measured again. Methods: `uniform`, the same
configuration for every layer; `calibrate`, on text that SmolLM2 writes itself, or for MiniLM on 256
sentences of WikiText-2, by the pooled embedding. `--statistics FILE` takes those of
`collect_statistics` from a file, and writes them there where it does not exist.

SmolLM2-135M: perplexity on the first tokens of WikiText-2, for each number of `--tokens`. Settings
are chosen on what follows token 60,000 (`--start 60000`): none is tuned on what is reported.
MiniLM: mean cosine of the embeddings of STS Benchmark's sentences with the dense model's, and
Spearman's correlation times 100. Both scatter with the random signs (`--seeds`).
"""

import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import machine, parser
from torch import Tensor, nn

from torchcodec_weights import (
    CodecWeightOnlyConfig,
    Statistics,
    calibrate,
    codec_weight_only,
    collect_statistics,
)
from torchcodec_weights.evaluation.data import STS_BENCHMARK, WIKITEXT2, data_file
from torchcodec_weights.evaluation.models import MODELS, encoded_weights
from torchcodec_weights.evaluation.perplexity import perplexity
from torchcodec_weights.evaluation.recoding import recode
from torchcodec_weights.evaluation.rows import Row, Rows
from torchcodec_weights.evaluation.sts import load_sts, sentence_embeddings, spearman
from torchcodec_weights.matrix.normalize import SIGN_SEED

SENTENCES = 256
SENTENCES_START = 60_000  # characters of WikiText-2


class Pooled(nn.Module):
    """Embeddings of sentences: the mean over tokens, of unit length."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, **inputs: Tensor) -> Tensor:
        return F.normalize(self.encoder(**inputs).last_hidden_state.mean(1), dim=-1)


class Model:
    """A model, its statistics, and how good it is."""

    def __init__(self, name: str, statistics: Path | None, start: int) -> None:
        self.name = name
        self.model, self.tokenizer = MODELS[name]()
        self.dense = {n: weight.data for n, weight in encoded_weights(self.model).items()}
        text = data_file(WIKITEXT2).read_text(encoding="utf-8")
        self.seconds = 0.0
        if name == "smollm2":
            self.subject, self.prefix, self.inputs = self.model, "", None
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            self.ids = torch.tensor(ids[start:])
        else:
            self.subject, self.prefix = Pooled(self.model), "encoder."
            # Sentences of prose, without headings.
            lines = [line for line in text[SENTENCES_START:].splitlines() if len(line) > 80]
            sentences = [line.split(" . ")[0].strip() + " ." for line in lines]
            self.inputs = [
                dict(self.tokenizer(s, return_tensors="pt", truncation=True, max_length=128))
                for s in sentences[:SENTENCES]
            ]
            self.pairs = load_sts(data_file(STS_BENCHMARK))
            self.embedded = self._embeddings()
        self.statistics = self._statistics(statistics)

    def _statistics(self, path: Path | None) -> Statistics:
        if path is not None and path.exists():
            return Statistics.load(path)
        start = time.perf_counter()
        names = {self.prefix + name.removesuffix(".weight") for name in self.dense}
        found = collect_statistics(
            self.subject, lambda module, name: name in names, sample_inputs=self.inputs
        )
        self.seconds = time.perf_counter() - start
        if path is not None:
            found.save(path)
        return found

    def _embeddings(self) -> tuple[Tensor, Tensor]:
        return (
            sentence_embeddings(self.model, self.tokenizer, self.pairs.first),
            sentence_embeddings(self.model, self.tokenizer, self.pairs.second),
        )

    def quality(self, tokens: list[int]) -> Row:
        """With the weights that the model has now."""
        if self.name == "smollm2":
            bos = self.tokenizer.bos_token_id
            return {
                "perplexity": {
                    str(count): perplexity(self.model, self.ids, bos, count) for count in tokens
                }
            }
        first, second = self._embeddings()
        cosine = (first.double() * second.double()).sum(1).numpy()
        agreement = torch.cat([a * b for a, b in zip((first, second), self.embedded, strict=True)])
        return {
            "cosine": float(agreement.sum(1).mean()),
            "spearman": 100 * spearman(cosine, self.pairs.scores),
        }

    def configs(
        self, method: str, config: CodecWeightOnlyConfig
    ) -> dict[str, CodecWeightOnlyConfig]:
        """What each weight is encoded with, by its name."""
        if method == "uniform":
            return dict.fromkeys(self.dense, config)
        names = {self.prefix + name.removesuffix(".weight") for name in self.dense}
        plan = calibrate(
            self.subject,
            config,
            lambda module, name: name in names,
            statistics=self.statistics,
        ).fqn_to_config
        return {name: plan[self.prefix + name.removesuffix(".weight")] for name in self.dense}

    def measure(
        self, method: str, config: CodecWeightOnlyConfig, seed: int, tokens: list[int]
    ) -> Row:
        begin = time.perf_counter()
        configs = self.configs(method, config)
        planned = time.perf_counter()
        bits_per_weight, decoded = recode(self.dense, configs, SIGN_SEED + seed)
        encoded = time.perf_counter()
        self._put(decoded)
        quality = self.quality(tokens)
        self._put(self.dense)
        return {
            "bits_per_weight": bits_per_weight,
            **quality,
            "layers": {name: configs[name].bits for name in self.dense},
            "seconds": {
                "statistics": self.seconds,
                "allocation": planned - begin,
                "encoding": encoded - planned,
            },
            "machine": machine(),
        }

    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.model.get_parameter(name).data = weight


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", choices=list(MODELS), default=["smollm2"])
    options.add_argument("--bits", nargs="+", type=float, default=[2.0, 2.5, 3.0, 4.0])
    options.add_argument("--methods", nargs="+", default=["uniform", "calibrate"])
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--codecs", nargs="+", default=["ectcq"], metavar="CODEC[/PRESET]")
    options.add_argument("--tokens", nargs="+", type=int, default=[4092, 20480])
    options.add_argument("--start", type=int, default=0, help="first token of the text")
    options.add_argument("--statistics", type=Path, metavar="FILE")
    args = options.parse_args()
    rows = Rows(args.json)
    model: Model | None = None
    cells = product(args.models, args.codecs, args.bits, args.seeds, args.methods)
    for name, codec, bits, seed, method in cells:
        key: Row = {"model": name, "codec": codec, "method": method, "bits": bits, "seed": seed}
        key |= {"start": args.start, "text": args.statistics.stem if args.statistics else "own"}
        row = rows.find(key)
        if row is None:
            if model is None or model.name != name:
                model = Model(name, args.statistics, args.start)
            kind, _, preset = codec.partition("/")
            config = codec_weight_only(kind, bits=bits, preset=preset or None)
            row = key | model.measure(method, config, seed, args.tokens)
            rows.add(row)
        print(_line(row), flush=True)


def _line(row: dict[str, Any]) -> str:
    found = row.get("perplexity") or {"cosine": row["cosine"], "Spearman": row["spearman"]}
    quality = ", ".join(f"{name}: {value:.4g}" for name, value in found.items())
    return (
        f"{row['model']} {row['codec']} {row['method']} {row['bits']} seed {row['seed']}: "
        f"{row['bits_per_weight']:.4f} bits, {quality}"
    )


if __name__ == "__main__":
    main()
