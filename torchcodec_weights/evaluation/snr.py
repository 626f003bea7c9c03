"""Signal-to-noise ratio of decoded weights."""

from collections.abc import Iterable
from math import inf, log10
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Weights = Tensor | NDArray[np.floating[Any]]


def snr_db(pairs: Iterable[tuple[Weights, Weights]]) -> float:
    """10 log10 of the energy of all weights over that of their errors, in dB.

    Sums are in float64.

    Args:
        pairs: each weight and its decoded weight, of the same shape.

    Returns:
        inf if there is no error, -inf if all weights are zero and there is an error.

    Raises:
        ValueError: the shapes of a pair differ.
    """
    energy = noise = 0.0
    for weight, decoded in pairs:
        if weight.shape != decoded.shape:
            raise ValueError(
                f"decoded of shape {tuple(decoded.shape)}: allowed: {tuple(weight.shape)}, the "
                "weight's"
            )
        dense = torch.as_tensor(weight).detach().double()
        energy += float(dense.square().sum())
        noise += float((torch.as_tensor(decoded).detach().double() - dense).square().sum())
    if noise == 0:
        return inf
    return 10 * log10(energy / noise) if energy > 0 else -inf
