"""`eval`: measures the quality of a model, dense or compressed."""

import argparse
from pathlib import Path
from typing import Any

from torchcodec_weights.cli.weights import add_allowed_codecs
from torchcodec_weights.convert.output import record_in_card
from torchcodec_weights.evaluation.metrics import METRICS, TITLES, default_metric, measure
from torchcodec_weights.evaluation.models import MODELS, load_by_name
from torchcodec_weights.system.terminal import printable

# Names of the metrics on their default texts in a model card.
_FACTS = {"perplexity": "perplexity_wikitext2", "sts": "sts_benchmark_spearman"}


def add(commands: Any) -> None:
    """Add the command to the subparsers of argparse."""
    parser = commands.add_parser(
        "eval",
        help="measure perplexity, or correlation with people's similarity scores",
        description="Measure the perplexity of a causal language model on a text, or Spearman's "
        "rank correlation of an encoder's sentence similarities (mean pooling) with people's.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help=f"directory, dense or compressed, or {' or '.join(MODELS)}"
    )
    parser.add_argument(
        "--task", choices=METRICS, help="default: perplexity if the model generates, else sts"
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="text for perplexity (default: WikiText-2), or for sts pairs in the layout of STS "
        "Benchmark (default: that)",
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="perplexity: of the text's first N (default: 20480)"
    )
    add_allowed_codecs(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.text is not None and not args.text.is_file():
        raise ValueError(f"--text={str(args.text)!r}: allowed: a file")
    model, tokenizer = load_by_name(args.model)
    metric = args.task or default_metric(model)
    value = measure(metric, model, tokenizer, args.text, args.tokens)
    print(printable(f"{args.model}: {TITLES[metric]} {value:.2f}"))
    if args.text is None and args.tokens is None:  # so that cards can be compared
        record_in_card(Path(args.model), _FACTS[metric], value)
