"""What errors of encoded weights cost by statistics of a text that they were not encoded with.

    python studies/held_out_cost.py STATISTICS OTHER_STATISTICS [--bits 2] [--codec ectcq/best]

Both files are of `collect_statistics` for SmolLM2-135M, of different texts (`--seed` of
`own_text`, say). Prints for twelve layers of three blocks the energy of the layer's output over
that of its error, in dB, both weighted as `Importance` does, with bits over or under the target
counted at 6.02 dB each. Random signs hardly move it, so it tells settings apart that perplexity
does not. Settings that are no options are changed by hand: `matrix/feedback.SHRINKAGE`, say.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from torchcodec_weights import Statistics, codec_weight_only
from torchcodec_weights.encoder.rate import DB_PER_BIT
from torchcodec_weights.evaluation.models import load_smollm2
from torchcodec_weights.evaluation.recoding import recode
from torchcodec_weights.matrix.importance import Importance

BLOCKS = 3, 14, 25
LAYERS = "mlp.down_proj", "mlp.gate_proj", "self_attn.q_proj", "self_attn.o_proj"


def cost(error: torch.Tensor, importance: Importance) -> float:
    """Σ_i G_i · (E H Eᵀ)_ii."""
    moments, rows = torch.from_numpy(np.array(importance.moments)), torch.tensor(importance.rows)
    return float(rows.double() @ ((error @ moments.double()) * error).sum(1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("statistics", type=Path)
    parser.add_argument("other", type=Path, help="statistics of another text")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--codec", default="ectcq", metavar="CODEC[/PRESET]")
    args = parser.parse_args()
    kind, _, preset = args.codec.partition("/")
    config = codec_weight_only(kind, bits=args.bits, preset=preset or None)
    model = load_smollm2()[0]
    here, other = Statistics.load(args.statistics), Statistics.load(args.other)
    gains = []
    for name in (f"model.layers.{block}.{layer}" for block in BLOCKS for layer in LAYERS):
        weight = model.get_submodule(name).weight.detach()
        known, judge = here[name], other[name]
        assert known is not None
        assert judge is not None
        bits, decoded = recode({name: weight}, {name: config.with_importance(known, args.bits)})
        error = decoded[name].double() - weight.double()
        gain = 10 * np.log10(cost(weight.double(), judge) / cost(error, judge))
        gains.append(gain + DB_PER_BIT * (args.bits - bits))
        print(f"{name:40} {gains[-1]:.2f} dB", flush=True)
    print(f"{'mean':40} {np.mean(gains):.3f} dB")


if __name__ == "__main__":
    main()
