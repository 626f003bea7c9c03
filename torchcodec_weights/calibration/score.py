"""A scalar of a model's output whose squared gradient measures what an error does to the output."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def call_model(model: nn.Module, example: Any) -> Any:
    """The output for a tensor, a tuple of positional or a mapping of named arguments."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple | list) else model(example)


def score(output: Any) -> Tensor:
    """A float32 scalar whose squared gradient is on average the curvature of the distortion.

    For logits, which is what transformers calls them, the distortion is the divergence of what
    they predict, in nats, and the curvature the Fisher information: labels are drawn from the
    prediction itself (Martens, arXiv 1412.1193, section 5). For anything else it is half the
    squared error, whose curvature is the mean square of the gradient of a sum with random signs
    (Hutchinson, 1989). Tokens and labels add up within one backward pass: drawn independently,
    their scores are uncorrelated.

    Args:
        output: with logits (..., classes) of two classes or more; or a tensor, or a tuple, list or
            mapping whose first value is one.

    Raises:
        ValueError: `output` is none of these, or holds NaN or infinity (logits may be minus
            infinity where others are finite).
    """
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.dim() and logits.shape[-1] > 1:
        return _likelihood(logits.flatten(0, -2) if logits.dim() > 1 else logits[None])
    if isinstance(output, Mapping):
        output = tuple(output.values())
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor) or not first.is_floating_point():
        kind = first.dtype if isinstance(first, Tensor) else type(first).__name__
        raise ValueError(
            f"the model returns {kind}: allowed: an output with logits, a tensor of floating-point "
            "numbers, or a tuple, list or mapping whose first value is one"
        )
    if not torch.isfinite(first.detach()).all():
        raise ValueError("the model's output holds NaN or infinity: allowed: finite values")
    signs = torch.randint_like(first, 2, dtype=torch.float32) * 2 - 1
    return (signs * first.float()).sum()


def _likelihood(logits: Tensor) -> Tensor:
    """Log-probability of labels drawn from the logits (tokens, classes), summed."""
    logits = logits.float()
    with torch.no_grad():
        # A class may be ruled out by minus infinity; the largest must be a number.
        if not torch.isfinite(logits.amax(dim=-1)).all():
            raise ValueError("the model's logits hold NaN or infinity: allowed: finite values")
        labels = torch.multinomial(torch.softmax(logits, dim=-1), 1).squeeze(-1)
    return -F.cross_entropy(logits, labels, reduction="sum")
