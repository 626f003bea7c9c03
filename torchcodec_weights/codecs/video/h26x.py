"""Functions for H.264, HEVC and VVC: steps of QPs, NAL units."""

import re
from collections.abc import Callable

_START_CODE = re.compile(rb"\x00*\x00\x00\x01")


def h26x_steps(depth: int, lowest: int, highest: int) -> dict[int, float]:
    """Step of each QP in units of samples of `depth` bits: 2^((QP − 4)/6) at 8 bits.

    H.264 clause 8.5, H.265 clause 8.6.3, H.266 clause 8.7.3. The QP is that of 8 bits: at more, a
    sample is worth less and a QP's step is as many samples more.
    """
    return {qp: 2.0 ** ((qp - 4) / 6 + depth - 8) for qp in range(lowest, highest + 1)}


def without_nal_units(stream: bytes, unwanted: Callable[[bytes], bool]) -> bytes:
    """An Annex B byte stream without the NAL units for whose header `unwanted` returns True."""
    starts = list(_START_CODE.finditer(stream))
    ends = [match.start() for match in starts[1:]] + [len(stream)]
    return b"".join(
        stream[match.start() : end]
        for match, end in zip(starts, ends, strict=True)
        if not unwanted(stream[match.end() : match.end() + 2])
    )
