"""AV1: the open bitstream units of a temporal unit, and the size of its frame."""

from collections.abc import Iterator
from typing import NamedTuple

from torchcodec_weights.codecs.headers.fields import Bits, Picture
from torchcodec_weights.errors import CodecError

# obu_type, clause 6.2.2.
_SEQUENCE, _DELIMITER, _METADATA, _FRAME = 1, 2, 5, 6
_MOST_UNITS = 32
_SELECT = 2  # SELECT_SCREEN_CONTENT_TOOLS, SELECT_INTEGER_MV


class _Sequence(NamedTuple):
    """Fields of a sequence header.

    Attributes:
        width, height: of frames that give no size of their own.
        width_bits, height_bits: length of a size that a frame gives.
        depth: bits per sample.
        reduced: reduced_still_picture_header: whether frame headers lack most fields.
        screen: seq_force_screen_content_tools.
        integer: seq_force_integer_mv.
        id_bits: length of frame ids.
        order_bits: length of frames' numbers in display order.
    """

    width: int
    height: int
    width_bits: int
    height_bits: int
    depth: int
    reduced: bool
    screen: int
    integer: int
    id_bits: int
    order_bits: int


def read(stream: bytes) -> Picture:
    """The picture of a stream of one shown key frame.

    Raises:
        CodecError: anything else is in the stream.
    """
    found: _Sequence | None = None
    picture: Picture | None = None
    for number, (kind, contents) in enumerate(_units(stream)):
        if number == _MOST_UNITS:
            raise CodecError(f"av1 stream has more than {_MOST_UNITS} units")
        if kind == _DELIMITER:
            if number:
                raise CodecError("av1 stream has several temporal units")
        elif kind == _SEQUENCE:
            sequence = _sequence(Bits(contents))
            if found not in (None, sequence):
                raise CodecError("av1 stream has sequence headers that differ")
            found = sequence
        elif kind == _FRAME:
            if found is None:
                raise CodecError("video stream has no sequence header")
            if picture is not None:
                raise CodecError("av1 stream has several frames")
            picture = _frame(Bits(contents), found)
        elif kind != _METADATA:
            raise CodecError(f"av1 stream has a unit of type {kind}")
    if found is None:
        raise CodecError("video stream has no sequence header")
    if picture is None:
        raise CodecError("av1 stream has no frame")
    return picture


def _units(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and contents of each unit, clauses 5.3.1 and 5.3.2."""
    position = 0
    while position < len(stream):
        header = stream[position]
        if header & 0x87 != 0x02:  # forbidden bit, extension, size, reserved bit
            raise CodecError("video stream is not of AV1 units with sizes, without layers")
        position += 1
        size = 0
        for shift in range(0, 56, 7):
            if position >= len(stream):
                raise CodecError("video stream is cut short in a unit's size")
            byte = stream[position]
            position += 1
            size |= (byte & 127) << shift
            if not byte & 128:
                break
        else:
            raise CodecError("av1 stream has a unit's size of more than 8 bytes")
        if size > len(stream) - position:
            raise CodecError("video stream is cut short in a unit")
        yield header >> 3, stream[position : position + size]
        position += size


def _sequence(bits: Bits) -> _Sequence:
    """sequence_header_obu(), clause 5.5."""
    profile = bits.read(3)
    bits.read(1)
    reduced = bits.read(1)
    if reduced:
        bits.read(5)
    else:
        if bits.read(1):
            raise CodecError("video stream has timing information")
        delays = bits.read(1)
        for _ in range(bits.read(5) + 1):
            bits.read(12)
            if bits.read(5) > 7:
                bits.read(1)
            if delays and bits.read(1):
                bits.read(4)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    width, height = bits.read(width_bits) + 1, bits.read(height_bits) + 1
    id_bits = 0
    if not reduced and bits.read(1):
        id_bits = bits.read(4) + 2 + bits.read(3) + 1
    bits.read(3)
    screen = integer = _SELECT
    order_bits = 0
    if not reduced:
        bits.read(4)
        ordered = bits.read(1)
        if ordered:
            bits.read(2)
        screen = _SELECT if bits.read(1) else bits.read(1)
        if screen > 0 and not bits.read(1):
            integer = bits.read(1)
        if ordered:
            order_bits = bits.read(3) + 1
    bits.read(3)
    deep = bits.read(1)
    if profile != 0:
        raise CodecError("video stream is not 4:2:0")
    return _Sequence(
        width,
        height,
        width_bits,
        height_bits,
        10 if deep else 8,
        bool(reduced),
        screen,
        integer,
        id_bits,
        order_bits,
    )


def _frame(bits: Bits, sequence: _Sequence) -> Picture:
    """The picture of a key frame that is shown: uncompressed_header(), clause 5.9.2.

    Raises:
        CodecError: it is another frame.
    """
    width, height = sequence.width, sequence.height
    if not sequence.reduced:
        if bits.read(4) != 0b0001:  # show_existing_frame, frame_type, show_frame
            raise CodecError("av1 stream has another frame than a key frame that is shown")
        bits.read(1)
        screen = bits.read(1) if sequence.screen == _SELECT else sequence.screen
        if screen and sequence.integer == _SELECT:
            bits.read(1)
        bits.read(sequence.id_bits)
        own_size = bits.read(1)
        bits.read(sequence.order_bits)
        if own_size:
            width = bits.read(sequence.width_bits) + 1
            height = bits.read(sequence.height_bits) + 1
    return Picture(width, height, width, height, sequence.depth)
