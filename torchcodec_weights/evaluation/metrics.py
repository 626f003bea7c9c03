"""The metrics by name, the default for a model, and their measurement."""

from pathlib import Path
from typing import Any

from torchcodec_weights.evaluation.data import STS_BENCHMARK, WIKITEXT2, data_file
from torchcodec_weights.evaluation.perplexity import text_perplexity
from torchcodec_weights.evaluation.sts import load_sts, sts_spearman


def default_metric(model: Any) -> str:
    """Perplexity for a transformers model that generates text, otherwise sts."""
    return "perplexity" if model.can_generate() else "sts"


def check_metric(metric: str, model: Any) -> None:
    """Raise ValueError if a metric cannot be measured for a transformers model."""
    if metric == "perplexity" and not model.can_generate():
        name = type(model).__name__
        raise ValueError(f"perplexity of {name}: allowed: a causal language model, or sts")


def measure(
    metric: str, model: Any, tokenizer: Any, text: Path | None = None, tokens: int | None = None
) -> float:
    """Measure a model.

    Args:
        metric: one of `choices.METRICS`.
        model, tokenizer: of transformers.
        text: a text for perplexity, pairs of sentences for sts; None for WikiText-2 and STS
            Benchmark, test splits both.
        tokens: for perplexity, number of tokens of the text; None for 20,480 or fewer.

    Returns:
        Perplexity, or Spearman's rank correlation times 100.

    Raises:
        ValueError: the model, the text or `tokens` does not suit the metric.
        FileNotFoundError: `text` does not exist, or is None in a package without its sources.
    """
    check_metric(metric, model)
    if metric == "sts":
        if tokens is not None:
            raise ValueError(f"tokens={tokens} with sts: allowed: nothing to choose")
        return sts_spearman(model, tokenizer, load_sts(text or data_file(STS_BENCHMARK)))
    content = (text or data_file(WIKITEXT2)).read_text(encoding="utf-8")
    return text_perplexity(model, tokenizer, content, tokens)
