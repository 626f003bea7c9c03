"""PyTorch's dtypes of weights."""

import torch

from torchcodec_weights.format.dtypes import DTYPE_CODES

FLOAT_DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in DTYPE_CODES)
"""The dtypes that a weight can have, and decode to."""
