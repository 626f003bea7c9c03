"""`eval`: measures the quality of a model, dense or compressed."""

import argparse
from pathlib import Path

from torchcodec_weights.convert.output import record_in_card
from torchcodec_weights.evaluation.choices import TITLES
from torchcodec_weights.evaluation.metrics import default_metric, measure
from torchcodec_weights.evaluation.models import load_by_name
from torchcodec_weights.system.terminal import printable

# Names of the metrics on their default texts in a model card.
_FACTS = {"perplexity": "perplexity_wikitext2", "sts": "sts_benchmark_spearman"}


def run(args: argparse.Namespace) -> None:
    """Run the command with the arguments of `cli.arguments`."""
    if args.text is not None and not args.text.is_file():
        raise ValueError(f"--text={str(args.text)!r}: allowed: a file")
    model, tokenizer = load_by_name(args.model)
    metric = args.task or default_metric(model)
    value = measure(metric, model, tokenizer, args.text, args.tokens)
    print(printable(f"{args.model}: {TITLES[metric]} {value:.2f}"))
    if args.text is None and args.tokens is None:  # so that cards can be compared
        record_in_card(Path(args.model), _FACTS[metric], value)
