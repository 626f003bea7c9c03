"""The private data of ECTCQ's streams by columns: entropy models, and which columns have which.

A matrix's columns, in the coded order, are taken in groups of 32. Groups whose weights have about
the same variance are of one class, and have one entropy model.
"""

import struct
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.codecs.ectcq import kernels
from torchcodec_weights.codecs.ectcq.column_kernels import (
    ColumnClass,
    DecoderClasses,
    SearchClasses,
)
from torchcodec_weights.codecs.ectcq.model import EntropyModel
from torchcodec_weights.codecs.records import StoredMatrix
from torchcodec_weights.errors import CodecError

MAX_CLASSES = 16
"""A group's class is stored in four bits."""

_BY_COLUMNS = 0x80
_HEAD = struct.Struct("<BB")
_COUNTS = struct.Struct("<BB")


def is_by_columns(private: bytes) -> bool:
    """Whether private data is that of a stream by columns."""
    return bool(private) and private[0] >= _BY_COLUMNS


def groups_of(cols: int) -> int:
    """Groups of 32 columns, the last of which may be smaller."""
    return -(-cols // kernels.LANES)


@dataclass(frozen=True, eq=False)
class ColumnModel:
    """Entropy models of a matrix's columns.

    Attributes:
        classes: 1 to `MAX_CLASSES` models of the same number of states.
        of_group: uint8 (groups,), the class of each group of 32 columns in coded order.
    """

    classes: tuple[EntropyModel, ...]
    of_group: NDArray[np.uint8]

    def to_bytes(self) -> bytes:
        """As it is stored in a container's private data (docs/bitstream.md)."""
        models = [model.to_bytes() for model in self.classes]
        nibbles = np.zeros(2 * (-(-len(self.of_group) // 2)), np.uint8)
        nibbles[: len(self.of_group)] = self.of_group
        return (
            _HEAD.pack(models[0][0] | _BY_COLUMNS, len(models))
            + b"".join(model[1:] for model in models)
            + (nibbles[::2] | nibbles[1::2] << 4).tobytes()
        )

    @classmethod
    def from_bytes(cls, data: bytes, cols: int) -> "ColumnModel":
        """The inverse of `to_bytes`, for a matrix of so many columns.

        Raises:
            CodecError: the data does not describe models of such a matrix.
        """
        if len(data) < _HEAD.size or not is_by_columns(data):
            raise CodecError("ectcq: entropy models of columns are cut short")
        log2_states, count = _HEAD.unpack_from(data)
        if not 1 <= count <= MAX_CLASSES:
            raise CodecError(f"ectcq: {count} classes of columns: allowed: 1 to {MAX_CLASSES}")
        head = bytes([log2_states & ~_BY_COLUMNS])
        place = _HEAD.size
        classes = []
        for _ in range(count):
            if len(data) < place + _COUNTS.size:
                raise CodecError("ectcq: entropy models of columns are cut short")
            end = place + _COUNTS.size + 3 * sum(_COUNTS.unpack_from(data, place)) - 1
            classes.append(EntropyModel.from_bytes(head + data[place:end]))
            place = end
        groups = groups_of(cols)
        packed = np.frombuffer(data[place:], np.uint8)
        if len(packed) != -(-groups // 2):
            raise CodecError(
                f"ectcq: {len(packed)} bytes of classes of columns for {groups} groups of them"
            )
        of_group = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
        if (of_group[:groups] >= count).any() or of_group[groups:].any():
            raise CodecError("ectcq: a group of columns has a class that is not there")
        return cls(tuple(classes), of_group[:groups].copy())

    def decoder_classes(self, unit: float) -> DecoderClasses:
        """What the decoder needs; values are rounded to float32 once, here."""
        classes = (ColumnClass * len(self.classes))()
        for made, model in zip(classes, self.classes, strict=True):
            frequency, values = model.by_symbol()
            np.frombuffer(made.frequency, np.uint16)[:] = frequency.reshape(-1)
            scaled = (values * unit).astype(np.float32)
            np.frombuffer(made.values, np.float32)[:] = scaled.reshape(-1)
        return DecoderClasses(classes, self.classes[0].states, self.of_group)

    def search_classes(self, step: float) -> SearchClasses:
        """What the trellis search needs."""
        models = (kernels.Model * len(self.classes))()
        kept = []
        for index, model in enumerate(self.classes):
            # Beyond the outermost level there is no other choice.
            models[index], best = model.search_model(step, (model.peak + 2) * step)
            kept.append(best)
        return SearchClasses(models, tuple(kept), self.of_group)


@lru_cache(maxsize=1024)
def decoder_classes_of(private: bytes, cols: int, unit: float) -> DecoderClasses:
    """Decoder tables of a matrix's private data, columns and step.

    Raises:
        CodecError: the data does not describe models of such a matrix.
    """
    return ColumnModel.from_bytes(private, cols).decoder_classes(unit)


def decoder_classes_of_matrix(matrix: StoredMatrix) -> DecoderClasses:
    """Decoder tables of a matrix.

    Raises:
        CodecError: its tiles differ in their step, or the private data does not describe models of
            it.
    """
    unit = float(matrix.units[0])
    if (matrix.units != unit).any():
        raise CodecError("ectcq: tiles differ in their step")
    return decoder_classes_of(matrix.private, matrix.cols, unit)


@lru_cache(maxsize=16)
def search_classes_of(private: bytes, cols: int, step: float) -> SearchClasses:
    """Tables of the trellis search of a matrix's private data, columns and step."""
    return ColumnModel.from_bytes(private, cols).search_classes(step)
