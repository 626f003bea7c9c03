"""What `plan_bits` gains over the same bits for every layer, and what else it could go by.

    python benchmarks/plan.py --json benchmarks/results/plan.json

Rows that the JSON file holds already are not measured again. Methods: `uniform`; `weights`, by the
squared error of weights, without running the model; `plan`, `plan_bits` as it is; `random`, on
16 times 64 random tokens; `data`, on text of the kind that is measured, none of it the same for
SmolLM2; `pooled`, for MiniLM, the same by the embedding of a sentence instead of its tokens'.
Quality is the perplexity of SmolLM2-135M on WikiText-2, and for MiniLM 100
times Spearman's correlation on the test pairs of STS Benchmark. Both scatter with the random
signs of normalization, so several seeds may be measured.
"""

import time
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import parser
from torch import Tensor, nn
from torchao.quantization import FqnToConfig

from torchcodec_weights import CodecWeightOnlyConfig, codec_weight_only, plan_bits
from torchcodec_weights.evaluation.data import STS_BENCHMARK, WIKITEXT2, data_file
from torchcodec_weights.evaluation.metrics import default_metric, measure
from torchcodec_weights.evaluation.models import MODELS, encoded_weights
from torchcodec_weights.evaluation.recoding import recode
from torchcodec_weights.evaluation.rows import Row, Rows
from torchcodec_weights.evaluation.sts import load_sts
from torchcodec_weights.matrix.normalize import SIGN_SEED, normalize
from torchcodec_weights.models.plan import allocate

SEQUENCES, LENGTH = 16, 64
TEXT_START = 100_000  # far behind the tokens that perplexity is measured on


class Pooled(nn.Module):
    """Embeddings of sentences of one length: the mean over tokens, of unit length."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, **inputs: Tensor) -> Tensor:
        return F.normalize(self.encoder(**inputs).last_hidden_state.mean(1), dim=-1)


class Model:
    """A model, how good it is, and inputs for it."""

    def __init__(self, name: str, tokens: int) -> None:
        self.model, self.tokenizer = MODELS[name]()
        self.metric = default_metric(self.model)
        self.tokens = tokens if self.metric == "perplexity" else None
        self.dense = {name: weight.data for name, weight in encoded_weights(self.model).items()}
        vocabulary = self.model.config.vocab_size
        random = torch.randint(
            vocabulary, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0)
        )
        self.random = list(random.split(1))
        self.text: list[Any]
        if self.metric == "perplexity":
            text = data_file(WIKITEXT2).read_text()
            options = {"add_special_tokens": False, "return_tensors": "pt", "verbose": False}
            ids: Tensor = self.tokenizer(text, **options).input_ids
            bos = self.tokenizer.bos_token_id
            part = ids[0, TEXT_START:][: SEQUENCES * (LENGTH - 1)].view(SEQUENCES, -1)
            self.text = list(torch.cat([torch.full((SEQUENCES, 1), bos), part], 1).split(1))
        else:
            sentences = load_sts(data_file(STS_BENCHMARK)).first[::40]
            self.text = [self.tokenizer(s, return_tensors="pt") for s in sentences]

    def quality(self) -> float:
        """With the weights that the model has now."""
        return measure(self.metric, self.model, self.tokenizer, tokens=self.tokens)

    def plan(self, method: str, config: CodecWeightOnlyConfig) -> dict[str, CodecWeightOnlyConfig]:
        """What to encode each weight with, by its name."""
        if method in ("uniform", "weights"):
            assert config.bits is not None
            bits = np.full(len(self.dense), config.bits)
            if method == "weights":
                error = np.array([_squared_error(weight) for weight in self.dense.values()])
                sizes = np.array([weight.numel() for weight in self.dense.values()])
                bits = allocate(error, sizes, config.bits)
            rates = zip(self.dense, bits, strict=True)
            return {name: replace(config, bits=float(rate)) for name, rate in rates}
        layers = self._planned(method, config).fqn_to_config
        return {name: layers[name.removesuffix(".weight")] for name in self.dense}

    def _planned(self, method: str, config: CodecWeightOnlyConfig) -> FqnToConfig:
        if method == "plan":
            return plan_bits(self.model, config)
        if method in ("random", "data"):
            inputs = self.random if method == "random" else self.text
            return plan_bits(self.model, config, sample_inputs=inputs)
        assert method == "pooled"
        plan = plan_bits(Pooled(self.model), config, sample_inputs=self.text)
        parts = plan.fqn_to_config.items()
        return FqnToConfig({name.removeprefix("encoder."): part for name, part in parts})

    def measure(self, method: str, config: CodecWeightOnlyConfig, seed: int) -> Row:
        start = time.perf_counter()
        plan = self.plan(method, config)
        seconds = time.perf_counter() - start
        bits_per_weight, decoded = recode(self.dense, plan, SIGN_SEED + seed)
        self._put(decoded)
        quality = self.quality()
        self._put(self.dense)
        return {"bits_per_weight": bits_per_weight, "quality": quality, "plan_seconds": seconds}

    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.model.get_parameter(name).data = weight


def _squared_error(weight: Tensor) -> float:
    """Squared error of a layer that gets no bits, with error shaped as that of the codecs is."""
    norm = normalize(weight.numpy(), 5.0)
    rows, cols = np.square(norm.row_scale).mean(), np.square(norm.col_scale).mean()
    return float(rows * cols * weight.numel())


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", choices=list(MODELS), default=["minilm", "smollm2"])
    options.add_argument("--bits", nargs="+", type=float, default=[2.0, 2.5, 3.0])
    options.add_argument(
        "--methods", nargs="+", default=["uniform", "plan", "random", "data", "weights"]
    )
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--codec", default="ectcq")
    options.add_argument("--preset", default="fast")
    options.add_argument("--tokens", type=int, default=4092)
    args = options.parse_args()
    rows = Rows(args.json)
    model: Model | None = None
    loaded = ""
    for name, bits, seed, method in product(args.models, args.bits, args.seeds, args.methods):
        key = {
            "model": name,
            "codec": f"{args.codec}/{args.preset}",
            "tokens": args.tokens if name == "smollm2" else None,
            "method": method,
            "bits": bits,
            "seed": seed,
        }
        row = rows.find(key)
        if row is None:
            if model is None or loaded != name:
                model, loaded = Model(name, args.tokens), name
            config = codec_weight_only(args.codec, bits=bits, preset=args.preset)
            row = key | model.measure(method, config, seed)
            rows.add(row)
        print(
            f"{name:8} {method:8} seed {seed}: {row['bits_per_weight']:.4f} bits, "
            f"{row['quality']:.2f}, planned in {row['plan_seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
