"""Error feedback across columns: what an error in one column takes from the columns after it.

Columns are quantized one after the other, the most important first. The error of each is carried
into those that are still to come, so that together they do least harm to the layer's output. That
is the recursion of GPTQ (Frantar et al., arXiv 2210.17323), and the linear prediction of LDLQ (Chee
et al., arXiv 2307.13304). The cost of an error in a column falls from the diagonal of the moments
to the conditional variance of its input, given the inputs of all later columns.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchcodec_weights.codecs.records import FloatArray

SHRINKAGE = 0.2
"""Share of the diagonal that the moments are mixed with: those of few tokens show correlations that
are not there, and feedback would follow them (studies/calibration.md)."""
_RIDGE = 1e-6


@dataclass(frozen=True, eq=False)
class Prediction:
    """How columns are predicted from those that were quantized before.

    Attributes:
        variances: float32 (cols,), the conditional variance of each column's input.
        factors: float32 (cols, cols): an error e in column j takes e · factors[j, k] from each
            column k that comes after it.
        order: uint32 (cols,), the columns as they are quantized.
    """

    variances: FloatArray
    factors: FloatArray
    order: NDArray[np.uint32]


def prediction(moments: FloatArray, shrinkage: float = SHRINKAGE) -> Prediction:
    """Factors for error feedback from the second moments of a layer's input.

    Args:
        moments: float32 (cols, cols), symmetric, positive semidefinite.
        shrinkage: share of the diagonal alone, 0 to 1.
    """
    order, lower = _factored(moments, shrinkage)
    variances = _variances(order, lower)
    # moments = M · Mᵀ, M upper triangular: the inverse of M is the factor of the inverse.
    upper = lower.flip(0, 1)
    del lower  # Each of these takes gigabytes where a layer has ten thousand inputs.
    inverse = torch.eye(len(upper), dtype=torch.float64).T  # by columns, as LAPACK has matrices
    torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
    del upper
    inverse /= inverse.diagonal()[:, None].clone()
    inverse.diagonal().zero_()
    place = torch.argsort(order)
    factors = inverse.float()
    del inverse
    return Prediction(variances, factors[place][:, place].numpy(), order.numpy().astype(np.uint32))


def conditional_variances(moments: FloatArray, shrinkage: float = SHRINKAGE) -> FloatArray:
    """`Prediction.variances` alone, float32 (cols,), in a third of the time."""
    return _variances(*_factored(moments, shrinkage))


def _factored(moments: FloatArray, shrinkage: float) -> tuple[Tensor, Tensor]:
    """The order of quantization, and the Cholesky factor of the moments in the reverse order."""
    diagonal = torch.from_numpy(np.array(moments.diagonal(), np.float64))
    diagonal.clamp_(min=float(diagonal.mean()) * _RIDGE or 1.0)
    order = torch.argsort(diagonal, descending=True, stable=True)
    backwards = order.flip(0).numpy()
    full = torch.from_numpy(moments[np.ix_(backwards, backwards)].astype(np.float64))
    full *= 1 - shrinkage
    full.diagonal().copy_(diagonal[backwards] * (1 + _RIDGE))
    return order, torch.linalg.cholesky(full)


def _variances(order: Tensor, lower: Tensor) -> FloatArray:
    variances = torch.empty(len(order), dtype=torch.float64)
    variances[order.flip(0)] = lower.diagonal().square()
    return variances.float().numpy()
