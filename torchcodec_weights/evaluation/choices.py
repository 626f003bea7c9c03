"""The metrics and their defaults, for the command line's arguments: without PyTorch."""

METRICS = ("perplexity", "sts")
TITLES = {"perplexity": "perplexity", "sts": "Spearman × 100"}
TOKENS = 20480
"""Of a text, for perplexity, where no number is given."""
