"""Inputs for calibration from a text and a model's tokenizer."""

from typing import Any

import torch
from torch import nn

from torchcodec_weights.calibration.text import LENGTH, SEQUENCES

_SENTENCES = 256


def inputs_of_text(text: str, tokenizer: Any, model: nn.Module) -> list[dict[str, Any]]:
    """Inputs for `collect_statistics` from the beginning of a text.

    For a model that generates: at most 16 sequences of 512 tokens, or of what the model takes, each
    after a BOS token if there is one. For others: at most 256 lines that are not blank, one by one,
    cut to what the model takes.

    Args:
        text: plain text.
        tokenizer: of transformers.
        model: of transformers.

    Raises:
        ValueError: the text holds no token.
    """
    config: Any = model.config
    longest = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    generator: Any = model
    if not generator.can_generate() or getattr(config, "is_encoder_decoder", False):
        lines = [line for line in text.splitlines() if line.strip()][:_SENTENCES]
        options = {"return_tensors": "pt", "truncation": True, "max_length": longest}
        inputs = [dict(tokenizer(line, **options)) for line in lines]
    else:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        parts = ids.long().split(longest - len(start))[:SEQUENCES]
        inputs = [
            {"input_ids": torch.cat([torch.tensor(start, dtype=torch.int64), part]).view(1, -1)}
            for part in parts
            if len(part)
        ]
    if not inputs:
        raise ValueError("the text to calibrate with holds no token: allowed: some text")
    return inputs
