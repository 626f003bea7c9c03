"""How much a model's output suffers from an error in each weight of a matrix."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Importance:
    """Second-order cost of an error E of a matrix: the sum over rows i of rows[i] · (E M Eᵀ)_ii.

    M is the matrix of second moments of the layer's input, or only its diagonal. It is the Fisher
    information in the approximation of K-FAC (Martens and Grosse, arXiv 1503.05671), without the
    covariance between outputs.

    Attributes:
        rows: float32 (rows,), the sum over all tokens of the squared gradient of the score by each
            output of the layer; 0 or more. The score is the logarithm of a probability, in nats,
            or a sum of outputs with random signs.
        moments: float32 (cols, cols), the mean over all tokens of x xᵀ, x being the layer's input;
            (cols,) where only the diagonal is known. It may be memory-mapped and read-only.

    Raises:
        ValueError: an array is not of this dtype or shape. Values are not looked at.
    """

    rows: NDArray[np.float32]
    moments: NDArray[np.float32]

    def __post_init__(self) -> None:
        for name, array, allowed in (
            ("rows", self.rows, "float32 (rows,)"),
            ("moments", self.moments, "float32 (cols, cols) or (cols,)"),
        ):
            flat = array.ndim == 1
            square = name == "moments" and array.ndim == 2 and len(set(array.shape)) == 1
            if array.dtype != np.float32 or array.size == 0 or not (flat or square):
                raise ValueError(f"{name} is {array.dtype} {array.shape}: allowed: {allowed}")

    def check(self, rows: int, cols: int) -> None:
        """Raise ValueError if this is not the importance of a matrix of this shape."""
        here = len(self.rows), len(self.moments)
        if here != (rows, cols):
            raise ValueError(
                f"importance of a matrix of {here[0]}x{here[1]} for a weight of {rows}x{cols}: "
                "allowed: one shape"
            )

    @property
    def columns(self) -> NDArray[np.float32]:
        """Float32 (cols,), the mean square of each input: the diagonal of `moments`."""
        return self.moments if self.moments.ndim == 1 else self.moments.diagonal()
