"""Models by name, metrics and their defaults, for the command line's arguments: without PyTorch."""

MODELS = ("smollm2", "minilm")
"""Names of models of packages (`models.py`)."""
METRICS = ("perplexity", "sts")
TITLES = {"perplexity": "perplexity", "sts": "Spearman × 100"}
TOKENS = 20480
"""Of a text, for perplexity, where no number is given."""
