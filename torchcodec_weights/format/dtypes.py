"""The dtypes of weights, as a container and the compiled code number them.

Without PyTorch, which a process that only decodes pictures does not import. PyTorch's dtypes of the
same names are `matrix.geometry.FLOAT_DTYPES`; `Type` in codecs/common/native/floats.h and in
codecs/ectcq/gpu.cu has the same numbers.
"""

DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}
"""Name of a dtype to its code in a container's header (docs/bitstream.md) and in compiled code."""

ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Name of a dtype to the bytes of a weight."""


def dtype_name(dtype: object) -> str:
    """Name of a `torch.dtype`: its text without the module."""
    return str(dtype).removeprefix("torch.")
