"""Print how many bytes opening and using each of some files took at most, and how it ended.

    python tests/memory_of.py FILE ...

The first loads libraries and starts threads, and does not count. A program of its own, as a process
that tests ran in before has memory to reuse.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from torchcodec_weights import CodecError, CodecTensor, load_file


def status(field: str) -> int:
    """Bytes that this process takes ("VmRSS"), or took at most ("VmHWM")."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def use(path: str) -> str:
    """Load a file and use what it holds; says how that ended."""
    try:
        for tensor in load_file(path).values():
            if isinstance(tensor, CodecTensor):
                F.linear(torch.ones(1, tensor.shape[-1], dtype=tensor.dtype), tensor)
                tensor.dequantize()
    except CodecError as error:
        return f"refused: {error}"
    return "used"


def main() -> None:
    first, *paths = sys.argv[1:]
    use(first)
    for path in paths:
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        end = use(path)
        print(status("VmHWM") - before, end)


if __name__ == "__main__":
    main()
