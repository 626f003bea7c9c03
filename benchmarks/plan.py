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

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import FqnToConfig

from torchcodec_weights import (
    CodecWeightOnlyConfig,
    codec_weight_only,
    compression_report,
    decompress_,
    plan_bits,
    quantize_,
)
from torchcodec_weights import normalize as normalization
from torchcodec_weights.evaluation.models import load_minilm, load_smollm2
from torchcodec_weights.evaluation.perplexity import perplexity
from torchcodec_weights.evaluation.sts import load_sts, sts_spearman
from torchcodec_weights.normalize import decode_scale, normalize
from torchcodec_weights.plan import allocate

DATA = Path(__file__).parent / "data"
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
        self.model, tokenizer = (load_smollm2 if name == "smollm2" else load_minilm)()
        vocabulary = self.model.config.vocab_size
        random = torch.randint(
            vocabulary, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0)
        )
        self.random = list(random.split(1))
        self.quality: Callable[[], float]
        self.text: list[Any]
        if name == "smollm2":
            text = (DATA / "wikitext2-test.txt").read_text()
            ids: Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            bos = tokenizer.bos_token_id
            self.quality = lambda: perplexity(self.model, ids[0], bos, tokens)
            part = ids[0, TEXT_START:][: SEQUENCES * (LENGTH - 1)].view(SEQUENCES, -1)
            self.text = list(torch.cat([torch.full((SEQUENCES, 1), bos), part], 1).split(1))
        else:
            pairs = load_sts(DATA / "sts-test.csv")
            self.quality = lambda: sts_spearman(self.model, tokenizer, pairs)
            self.text = [tokenizer(s, return_tensors="pt") for s in pairs.first[::40]]

    def selected(self) -> dict[str, nn.Linear]:
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        }

    def plan(self, method: str, config: CodecWeightOnlyConfig) -> FqnToConfig:
        if method == "plan":
            return plan_bits(self.model, config)
        if method in ("random", "data"):
            inputs = self.random if method == "random" else self.text
            return plan_bits(self.model, config, sample_inputs=inputs)
        if method == "pooled":
            plan = plan_bits(Pooled(self.model), config, sample_inputs=self.text)
            parts = plan.fqn_to_config.items()
            return FqnToConfig({name.removeprefix("encoder."): part for name, part in parts})
        layers = self.selected()
        assert config.bits is not None
        bits = np.full(len(layers), config.bits)
        if method == "weights":
            error = np.array([_squared_error(layer.weight) for layer in layers.values()])
            sizes = np.array([layer.weight.numel() for layer in layers.values()])
            bits = allocate(error, sizes, config.bits)
        return FqnToConfig(
            {n: replace(config, bits=float(b)) for n, b in zip(layers, bits, strict=True)}
        )

    def measure(self, method: str, config: CodecWeightOnlyConfig, seed: int) -> dict[str, Any]:
        start = time.perf_counter()
        plan = self.plan(method, config)
        seconds = time.perf_counter() - start
        dense = {name: layer.weight for name, layer in self.selected().items()}
        with different_signs(seed):
            quantize_(self.model, plan)
        bits_per_weight = compression_report(self.model).bits_per_weight
        decompress_(self.model)
        quality = self.quality()
        for name, weight in dense.items():
            self.model.get_submodule(name).weight = weight
        return {"bits_per_weight": bits_per_weight, "quality": quality, "plan_seconds": seconds}


@contextmanager
def different_signs(seed: int) -> Iterator[None]:
    before = normalization._SEED
    normalization._SEED += seed
    try:
        yield
    finally:
        normalization._SEED = before


def _squared_error(weight: Tensor) -> float:
    """Squared error of a layer that gets no bits, with error shaped as that of the codecs is."""
    norm = normalize(weight.detach().numpy(), 5.0)
    rows = np.square(decode_scale(norm.scale, norm.row_base)).mean()
    cols = np.square(decode_scale(norm.act_pre_scale, norm.col_base)).mean()
    return float(rows * cols * weight.numel())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["minilm", "smollm2"])
    parser.add_argument("--bits", nargs="+", type=float, default=[2.0, 2.5, 3.0])
    parser.add_argument(
        "--methods", nargs="+", default=["uniform", "plan", "random", "data", "weights"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--codec", default="ectcq")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--tokens", type=int, default=4092)
    parser.add_argument("--json", type=Path, help="rows are read from there and written to it")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if args.json and args.json.exists():
        rows = json.loads(args.json.read_text())
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
        row = next((r for r in rows if key.items() <= r.items()), None)
        if row is None:
            if model is None or loaded != name:
                model, loaded = Model(name, args.tokens), name
            config = codec_weight_only(args.codec, bits=bits, preset=args.preset)
            row = key | model.measure(method, config, seed)
            rows.append(row)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")
        print(
            f"{name:8} {method:8} seed {seed}: {row['bits_per_weight']:.4f} bits, "
            f"{row['quality']:.2f}, planned in {row['plan_seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
