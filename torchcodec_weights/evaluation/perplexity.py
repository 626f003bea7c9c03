"""How good a compressed model is: perplexity of causal language models."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

WINDOW = 1023


@torch.inference_mode()
def perplexity(model: nn.Module, tokens: Tensor, bos: int, count: int, batch: int = 1) -> float:
    """Perplexity on a text: exp of the mean negative log-likelihood of its first tokens.

    Windows of 1,023 tokens after one BOS each, without overlap, so that every token counts once
    and no window is longer than 1,024.

    Args:
        model: a transformers causal language model, called as model(input_ids) → logits.
        tokens: int64 (n,), the text without special tokens.
        bos: id of the token that starts a window.
        count: how many tokens to predict, at most n.
        batch: windows in one forward pass.

    Raises:
        ValueError: `count` is not between 1 and n.
    """
    if not 0 < count <= len(tokens):
        raise ValueError(f"count={count}: allowed: 1 to {len(tokens)}, the tokens of the text")
    total, windows = 0.0, list(torch.split(tokens[:count], WINDOW))
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
