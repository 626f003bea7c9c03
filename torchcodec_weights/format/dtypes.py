"""The dtypes of weights, as a container and the compiled code number them.

Without PyTorch, which a process that only decodes pictures does not import. PyTorch's dtypes of the
same names are `matrix.dtypes.FLOAT_DTYPES`; `Type` in codecs/common/native/floats.h and in
codecs/ectcq/gpu.cu has the same numbers.
"""

from dataclasses import dataclass

DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}
"""Name of a dtype to its code in a container's header (docs/bitstream.md) and in compiled code."""

ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Name of a dtype to the bytes of a weight."""


@dataclass(frozen=True)
class FloatDtype:
    """A dtype of weights where PyTorch is not imported. Its text is that of PyTorch's."""

    name: str

    def __str__(self) -> str:
        return f"torch.{self.name}"


def dtype_name(dtype: object) -> str:
    """Name of a `torch.dtype`: its text without the module."""
    return str(dtype).removeprefix("torch.")
