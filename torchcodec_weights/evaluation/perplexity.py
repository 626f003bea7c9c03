"""Perplexity of causal language models."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from torchcodec_weights.evaluation.choices import TOKENS

WINDOW = 1023


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    bos: int,
    count: int,
    batch: int = 1,
    window: int = WINDOW,
) -> float:
    """Perplexity on a text: exp of the mean negative log-likelihood of its first tokens.

    Windows of 1,023 tokens after one BOS each, without overlap, so that every token counts once
    and no window is longer than 1,024.

    Args:
        model: a transformers causal language model, called as model(input_ids) → logits.
        tokens: int64 (n,), the text without special tokens.
        bos: id of the token that starts a window.
        count: how many tokens to predict, at most n.
        batch: windows in one forward pass.
        window: tokens in a window, for models that do not take 1,024.

    Raises:
        ValueError: `count` is not between 1 and n.
    """
    if not 0 < count <= len(tokens):
        raise ValueError(f"count={count}: allowed: 1 to {len(tokens)}, the tokens of the text")
    total, windows = 0.0, list(torch.split(tokens[:count], window))
    groups = [windows[i : i + batch] for i in range(0, len(windows), batch)]
    device: Any = next(model.parameters()).device
    for group in tqdm(groups, desc="perplexity", unit="batch", leave=False):
        for same in ([w for w in group if len(w) == n] for n in {len(w) for w in group}):
            target = torch.stack(same).to(device)
            start = torch.full((len(same), 1), bos, device=device)
            logits = model(torch.cat([start, target[:, :-1]], dim=1)).logits.float()
            total += nn.functional.cross_entropy(
                logits.flatten(0, 1), target.flatten(), reduction="sum"
            ).item()
    return math.exp(total / count)


def text_perplexity(model: nn.Module, tokenizer: Any, text: str, count: int | None = None) -> float:
    """Perplexity of a transformers model on a text, as `perplexity` measures it.

    Args:
        model: a causal language model. Windows are shorter than 1,023 tokens if its configuration
            allows fewer positions.
        tokenizer: its tokenizer. Its EOS token is used if it has no BOS token.
        text: tokenized without special tokens.
        count: how many tokens to predict; None for 20,480, or all if there are fewer.

    Raises:
        ValueError: `count` is not between 1 and the tokens of the text, or the tokenizer has
            neither token.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if bos is None:
        raise ValueError("the tokenizer has neither a BOS nor an EOS token to start a window with")
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None) or WINDOW + 1
    window = min(WINDOW, positions - 1)
    return perplexity(
        model, ids, bos, min(TOKENS, len(ids)) if count is None else count, window=window
    )
