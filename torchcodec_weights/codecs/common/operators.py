"""PyTorch's operators in compiled code: their registration, and the weights that it knows.

At a weight's first uses Python decides how to multiply by it. If that is what compiled code does,
it is told of the weight, by `know` or by the operator `keep_levels`, and does it without Python
from then on: until `forget`, or until something other than tiles is written to.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_bool, c_char_p, c_int64, c_size_t, c_void_p
from functools import cache
from typing import Any

from torch import Tensor

from torchcodec_weights.codecs.common import compiled

KNOWN: dict[int, set[tuple[int, Sequence[int]]]] = {}
"""What compiled code knows: by address of the container, the matrix' serial number and window."""


@cache
def _library() -> ctypes.CDLL | None:
    """The library with its kernels registered; None where it or torch lacks what they need."""
    lib = compiled.library()
    if lib is None or not hasattr(lib, "codecs_register"):
        return None
    lib.codecs_register.restype = c_char_p
    array: list[Any] = [c_void_p, c_size_t]
    lib.codecs_know.argtypes = [*array, *array, *array, *array, ctypes.POINTER(c_int64)]
    lib.codecs_know.restype = c_bool
    lib.codecs_forget.argtypes = [c_void_p]
    return None if lib.codecs_register() else lib


def register() -> bool:
    """Register the kernels with PyTorch, after the operators are defined; False if not possible."""
    return _library() is not None


def know(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    act_pre_scale: Tensor,
    window: Sequence[int],
) -> bool:
    """Have compiled code multiply by a weight, if it can; call `forget` when the weight is freed.

    Args:
        qdata, scale, zero_point, act_pre_scale: of the weight, checked, on the CPU.
        window: as of the operators.
    """
    lib = _library()
    if lib is None:
        return False
    arrays: list[int | None] = []
    for array in (qdata, scale, zero_point, act_pre_scale):
        arrays += (None, 0) if array is None else (array.data_ptr(), array.numel())
    return bool(lib.codecs_know(*arrays, (c_int64 * 4)(*window)))


def forget(qdata: int | None = None) -> None:
    """Have Python decide again how to multiply by a weight.

    Args:
        qdata: address of its container; None for all weights.
    """
    if qdata is None:
        KNOWN.clear()
    else:
        KNOWN.pop(qdata, None)
    lib = _library()
    if lib is not None:
        lib.codecs_forget(qdata)
