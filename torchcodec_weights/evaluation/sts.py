"""Semantic textual similarity: rank correlation of an encoder's similarities with human scores."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

_BATCH = 64


@dataclass(frozen=True)
class SentencePairs:
    """Pairs of sentences that people have scored.

    Attributes:
        first, second: the sentences.
        scores: float64 (n,), similarity of each pair, as people scored it.
    """

    first: list[str]
    second: list[str]
    scores: NDArray[np.float64]


def load_sts(path: Path) -> SentencePairs:
    """Read pairs in the layout of STS Benchmark.

    Args:
        path: a file without header, columns separated by tabs: the score is column 5, the
            sentences are columns 6 and 7.

    Raises:
        ValueError: a line is not of this layout; names it. Or there are fewer than two.
    """
    first, second, scores = [], [], []
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
            try:
                score, one, other = float(row[4]), row[5], row[6]
            except (IndexError, ValueError):
                raise ValueError(
                    f"{path}, line {number}: allowed: seven columns separated by tabs, the fifth "
                    "a score, the sixth and seventh sentences"
                ) from None
            scores.append(score)
            first.append(one)
            second.append(other)
    if len(scores) < 2:
        raise ValueError(f"{path} holds {len(scores)} pairs: allowed: two or more")
    return SentencePairs(first, second, np.array(scores))


@torch.inference_mode()
def sentence_embeddings(model: nn.Module, tokenizer: Any, sentences: list[str]) -> Tensor:
    """Embed sentences by the mean over their tokens of a model's last hidden states.

    Args:
        model: a transformers model; a head is not used.
        tokenizer: its tokenizer.
        sentences: n of them.

    Returns:
        float32 (n, hidden size), each of unit length.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    body: Any = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    # Sentences of similar length in a batch need little padding.
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    embedded: list[Tensor | None] = [None] * len(sentences)
    for start in tqdm(range(0, len(order), _BATCH), desc="sentences", unit="batch", leave=False):
        batch = order[start : start + _BATCH]
        inputs = tokenizer(
            [sentences[index] for index in batch],
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        hidden = body(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        means = (hidden * mask).sum(1) / mask.sum(1)
        for index, row in zip(batch, nn.functional.normalize(means).cpu(), strict=True):
            embedded[index] = row
    return torch.stack([row for row in embedded if row is not None])


def sts_spearman(model: nn.Module, tokenizer: Any, pairs: SentencePairs) -> float:
    """Spearman's rank correlation of the cosine similarity of embeddings with people's scores.

    Returns:
        100 times the coefficient, as is usual for this benchmark.
    """
    first = sentence_embeddings(model, tokenizer, pairs.first)
    second = sentence_embeddings(model, tokenizer, pairs.second)
    cosine = (first.double() * second.double()).sum(1).numpy()
    return 100 * spearman(cosine, pairs.scores)


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's rank correlation coefficient of two vectors (n,); NaN where one is constant."""
    ranks = np.stack([_ranks(a), _ranks(b)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    energy = np.square(ranks).sum(axis=1)
    return float(ranks[0] @ ranks[1] / np.sqrt(energy.prod())) if energy.all() else float("nan")


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank of each value; equal ones share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: NDArray[np.float64] = ends - (counts - 1) / 2
    return means[inverse]
