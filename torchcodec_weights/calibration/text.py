"""Text that a causal language model writes itself: inputs that need no data."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from torchcodec_weights.calibration.state import undisturbed

SEQUENCES = 16
LENGTH = 512
"""Tokens of a sequence by default."""


def own_text(
    model: nn.Module, count: int = SEQUENCES, length: int = LENGTH, *, seed: int = 0
) -> Tensor:
    """Sequences of tokens that a causal language model of transformers samples from itself.

    At temperature 1, from the whole vocabulary, whatever the checkpoint's defaults are; only the
    end of the text (EOS) is ruled out, so that all sequences have one length. They start with the
    token that begins a text (BOS), or each with a random token if the model has none.

    All sequences are one batch. Memory: their cache of keys and values, in the model's dtype, and
    the logits of one token each. A bar shows the time left.

    Args:
        model: left as it was, and on its device.
        count: sequences.
        length: tokens of a sequence, the first included; fewer where the model takes fewer. Time
            is nearly in proportion to it, whatever the count.
        seed: of the random numbers; the caller's random state is left as it was.

    Returns:
        int64 (count, length) on the model's device.

    Raises:
        ValueError: `model` is not such a model, or `count` or `length` is not a positive integer.
    """
    for name, value in (("count", count), ("length", length)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: allowed: an integer above 0")
    causal = _causal(model)
    config: Any = causal.config.get_text_config(decoder=True)
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    with undisturbed(model, seed), _no_defaults(causal.generation_config) as defaults:
        start = defaults.get("bos_token_id")
        start = getattr(config, "bos_token_id", None) if start is None else start
        first = torch.randint(config.vocab_size, (count, 1))
        if start is not None:
            first.fill_(start)
        first = first.to(next(model.parameters()).device)
        if length == 1:
            return first
        with tqdm(total=first.numel() * length, desc="text", unit="token", leave=False) as bar:
            tokens: Tensor = causal.generate(
                first,
                attention_mask=torch.ones_like(first),
                streamer=_Progress(bar),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
                eos_token_id=defaults.get("eos_token_id"),
                pad_token_id=0,
                use_cache=True,
            )
    return tokens


def _causal(model: Any) -> Any:
    generates = getattr(model, "can_generate", None)
    if (
        not callable(generates)
        or not generates()
        or getattr(model.config, "is_encoder_decoder", False)
    ):
        raise ValueError(
            f"sample_inputs=None with {type(model).__name__}: allowed for causal language models "
            "of transformers, which write text themselves; for others give sample_inputs"
        )
    return model


@contextmanager
def _no_defaults(config: Any) -> Iterator[dict[str, Any]]:
    """Set aside what a checkpoint has for generation: penalties, forced and suppressed tokens.

    `generate` fills whatever its caller leaves open from there. In place, as wrappers such as
    peft's hand the same object on.
    """
    attributes = vars(config)
    kept = dict(attributes)
    blank = vars(type(config)())
    attributes.clear()
    attributes.update(blank)
    try:
        yield kept
    finally:
        attributes.clear()
        attributes.update(kept)


class _Progress:
    """What `generate` calls a streamer: it gets each token of each sequence when it is drawn."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    def put(self, tokens: Tensor) -> None:
        self._bar.update(tokens.numel())

    def end(self) -> None:
        """Nothing: the bar is closed by who opened it."""
