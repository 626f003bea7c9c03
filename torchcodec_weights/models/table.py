"""The table of encoded weights that reports print, and its JSON. Without PyTorch."""

import json
from dataclasses import asdict, dataclass
from math import inf, isfinite, log10

import numpy as np

from torchcodec_weights.format.container import Header
from torchcodec_weights.format.dtypes import ITEM_SIZES
from torchcodec_weights.system.terminal import printable


@dataclass(frozen=True)
class WeightReport:
    """One encoded weight.

    Attributes:
        name: of the parameter; the first name if modules share it.
        shape: rows and columns of the weight, which may be a slice of its matrix.
        codec: name of the codec.
        bits_per_weight: everything stored, over the number of weights.
        lossy: False if every weight is exactly what it was.
        snr_db: weights over error, in dB, as the encoder measured it; infinite if not lossy.
        stored_bytes: bytes of bitstream and scales.
        dense_bytes: bytes of the dense weight.
        tiles: number of tiles that it holds; each can be decoded alone.
        decoder: name of the decoder for its device.
        resident: "bits", or the other form in which `resident` keeps it in memory.
        resident_bytes: bytes of that form, beside the bitstream's.
        resident_snr_db: decoded weights over that form's error, in dB; infinite if it has none.
    """

    name: str
    shape: tuple[int, int]
    codec: str
    bits_per_weight: float
    lossy: bool
    snr_db: float
    stored_bytes: int
    dense_bytes: int
    tiles: int
    decoder: str
    resident: str = "bits"
    resident_bytes: int = 0
    resident_snr_db: float = inf

    @classmethod
    def of(
        cls,
        name: str,
        header: Header,
        window: list[int],
        dtype: str,
        stored_bytes: int,
        decoder: str,
        resident: str = "bits",
        resident_bytes: int = 0,
        resident_snr_db: float = inf,
    ) -> "WeightReport":
        """The report on a weight.

        Args:
            name: of the parameter.
            header: of its container.
            window: first row, rows, first column and columns of the matrix that it consists of.
            dtype: its name, one of `ITEM_SIZES`.
            stored_bytes, decoder, resident, resident_bytes, resident_snr_db: as in the class.
        """
        _, rows, _, cols = window
        return cls(
            name,
            (rows, cols),
            header.codec,
            8 * stored_bytes / (rows * cols),
            header.snr_db != inf,
            header.snr_db,
            stored_bytes,
            rows * cols * ITEM_SIZES[dtype],
            int(np.count_nonzero(header.tiles["payload_size"])),
            decoder,
            resident,
            resident_bytes,
            resident_snr_db,
        )

    @property
    def used_snr_db(self) -> float:
        """Weights over the error of what is computed with: the codec's and that of `resident`."""
        errors = 10 ** (-self.snr_db / 10) + 10 ** (-self.resident_snr_db / 10)
        return -10 * log10(errors) if errors else inf


@dataclass(frozen=True)
class Table:
    """Encoded weights, with totals; prints as a table.

    Attributes:
        weights: the encoded weights.
        other_bytes: bytes of all tensors that are not encoded.
    """

    weights: tuple[WeightReport, ...]
    other_bytes: int

    @property
    def stored_bytes(self) -> int:
        """Bytes of all encoded weights."""
        return sum(weight.stored_bytes for weight in self.weights)

    @property
    def dense_bytes(self) -> int:
        """Bytes that the encoded weights would take dense."""
        return sum(weight.dense_bytes for weight in self.weights)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all weights that `resident` keeps, beside the bitstreams'."""
        return sum(weight.resident_bytes for weight in self.weights)

    @property
    def bits_per_weight(self) -> float:
        """Over all encoded weights."""
        count = sum(weight.shape[0] * weight.shape[1] for weight in self.weights)
        return 8 * self.stored_bytes / count if count else 0.0

    @property
    def totals(self) -> str:
        """The last line of the table."""
        kept = f"Resident beside them: {self.resident_bytes:,} bytes. "
        return (
            f"{len(self.weights)} weights: {self.stored_bytes:,} bytes, {self.bits_per_weight:.3f} "
            f"bits per weight; dense they take {self.dense_bytes:,}. "
            f"{kept if self.resident_bytes else ''}Not encoded: {self.other_bytes:,} bytes."
        )

    def to_json(self) -> str:
        """The same as JSON; an infinite SNR, which JSON does not have, is null."""
        rows = [asdict(weight) for weight in self.weights]
        for row in rows:
            for name in ("snr_db", "resident_snr_db"):
                row[name] = row[name] if isfinite(row[name]) else None
        return json.dumps(
            {
                "weights": rows,
                "stored_bytes": self.stored_bytes,
                "dense_bytes": self.dense_bytes,
                "resident_bytes": self.resident_bytes,
                "other_bytes": self.other_bytes,
                "bits_per_weight": self.bits_per_weight,
            },
            indent=2,
        )

    def __str__(self) -> str:
        """The table. SNR is that of what is computed with (`WeightReport.used_snr_db`)."""
        names = [printable(weight.name) for weight in self.weights]
        width = max([len(name) for name in names] + [6])
        lines = [
            f"{'weight':{width}}  {'shape':>13}  codec     bits/weight  SNR dB       bytes  tiles  "
            "resident  decoder"
        ]
        for name, weight in zip(names, self.weights, strict=True):
            shape = f"{weight.shape[0]} x {weight.shape[1]}"
            lines.append(
                f"{name:{width}}  {shape:>13}  {printable(weight.codec):8}  "
                f"{weight.bits_per_weight:11.3f}  {weight.used_snr_db:6.2f}  "
                f"{weight.stored_bytes:10,}  {weight.tiles:5}  {weight.resident:8}  "
                f"{weight.decoder}"
            )
        return "\n".join([*lines, self.totals])
