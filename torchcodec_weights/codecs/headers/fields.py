"""Types of the header readers: the picture that a header describes, and a reader of bits."""

from typing import NamedTuple

from torchcodec_weights.errors import CodecError


class Picture(NamedTuple):
    """Size and depth of a stream's picture.

    Attributes:
        width, height: of the luma samples that a decoder returns.
        coded_width, coded_height: with the margin that is coded but cut off.
        depth: bits per sample.
    """

    width: int
    height: int
    coded_width: int
    coded_height: int
    depth: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


_LIMIT = 1024  # bytes; the fields that are read are within so many bytes of a header
_GOLOMB_BITS = 32  # the longest ue(v) that the standards have


class Bits:
    """Reads the first kilobyte of a header, most significant bit first."""

    def __init__(self, data: bytes) -> None:
        start = data[:_LIMIT]
        self._value = int.from_bytes(start, "big")
        self._left = 8 * len(start)

    def read(self, count: int) -> int:
        """An unsigned number of `count` bits.

        Raises:
            CodecError: there are not so many.
        """
        self._left -= count
        if self._left < 0:
            raise CodecError("header of a video stream is cut short")
        return self._value >> self._left & (1 << count) - 1

    def align(self) -> None:
        """Skip to the next byte."""
        self._left -= self._left % 8

    def golomb(self) -> int:
        """ue(v): an unsigned Exp-Golomb code, H.264 and H.265 clause 9, H.266 clause 9.2.

        Raises:
            CodecError: it is cut short, or longer than the standards allow.
        """
        zeros = 0
        while not self.read(1):
            zeros += 1
            if zeros > _GOLOMB_BITS:
                raise CodecError("header of a video stream has a number of more than 32 bits")
        return (1 << zeros) - 1 + self.read(zeros)

    def signed_golomb(self) -> int:
        """se(v): a signed Exp-Golomb code."""
        code = self.golomb()
        return (code + 1) // 2 if code % 2 else -(code // 2)


def uncropped(height: int, width: int, depth: int) -> Picture:
    """A picture that is coded without a margin."""
    return Picture(width, height, width, height, depth)


def cropped(
    width: int, height: int, crops: tuple[int, int, int, int], unit: tuple[int, int], depth: int
) -> Picture:
    """A coded picture without its margin.

    Args:
        width, height: coded luma samples.
        crops: left, right, top and bottom margin, in units.
        unit: luma samples across and down that a unit of margin stands for.

    Raises:
        CodecError: nothing is left.
    """
    left, right, top, bottom = crops
    shown = width - unit[0] * (left + right), height - unit[1] * (top + bottom)
    if min(shown) < 1:
        raise CodecError(f"video stream has a picture of {width}x{height} that is cut off entirely")
    return Picture(*shown, width, height, depth)
