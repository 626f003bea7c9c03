"""Reports on compressed models, weight by weight, and conversion back to dense weights."""

import json
import reprlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import inf, isfinite, log10
from typing import Any

import numpy as np
from torch import Tensor, nn

from torchcodec_weights.codecs.registry import codec_info, is_known
from torchcodec_weights.decoders.choice import decoder_name
from torchcodec_weights.decoders.resident import KEPT, KeptWeight, find
from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.opened import open_matrix
from torchcodec_weights.models.quantize import restore_repr
from torchcodec_weights.system.terminal import printable
from torchcodec_weights.tensor import CodecTensor


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

    @property
    def used_snr_db(self) -> float:
        """Weights over the error of what is computed with: the codec's and that of `resident`."""
        errors = 10 ** (-self.snr_db / 10) + 10 ** (-self.resident_snr_db / 10)
        return -10 * log10(errors) if errors else inf


@dataclass(frozen=True)
class Report:
    """All encoded weights of a model, with totals; prints as a table.

    Attributes:
        weights: the encoded weights.
        other_bytes: bytes of all parameters and buffers that are not encoded.
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


def compression_report(model: nn.Module) -> Report:
    """Report on all CodecTensors among the parameters and buffers of a model.

    Raises:
        ValueError: `model` is no module.
    """
    _check_model(model)
    return report_tensors([*model.named_parameters(), *model.named_buffers()])


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={reprlib.repr(model)}: allowed: a torch.nn.Module")


def report_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Report:
    """Report on all CodecTensors among named tensors; a tensor with several names counts once."""
    weights, other = [], 0
    seen: set[int] = set()
    for name, tensor in tensors:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        data = tensor.data
        if not isinstance(data, CodecTensor):
            other += data.nbytes
            continue
        header = data.header
        _, rows, _, cols = data.resolved_window
        kept = _kept(tensor)
        weights.append(
            WeightReport(
                name,
                (rows, cols),
                header.codec,
                data.bits_per_weight,
                header.snr_db != inf,
                header.snr_db,
                data.stored_bytes,
                data.numel() * data.element_size(),
                int(np.count_nonzero(header.tiles["payload_size"])),
                _decoder(data),
                *((kept.form, kept.nbytes, kept.snr_db) if kept else ()),
            )
        )
    return Report(tuple(weights), other)


def _kept(weight: Tensor) -> KeptWeight | None:
    if not KEPT or not isinstance(weight, CodecTensor) or not is_known(weight.codec):
        return None
    return find(open_matrix(*weight.coded), Window(*weight.resolved_window), weight.device)


def _decoder(weight: CodecTensor) -> str:
    name, device = weight.codec, weight.qdata.device
    if not is_known(name):
        return "none: unknown codec"
    if device.type == "cpu" or "cpu" not in codec_info(name).decoders:
        return decoder_name(name, device)  # a matrix without a decoder cannot be opened
    return decoder_name(name, device, open_matrix(*weight.coded))


def decompress_(model: nn.Module) -> nn.Module:
    """Replace every CodecTensor of a model by its decoded weight, in place.

    For small files and enough memory: the model then runs at dense speed, with the values of the
    compressed one.

    Returns:
        The model.

    Raises:
        CodecError: a bitstream is corrupt; names the parameter. The weights before it have been
            replaced.
        ValueError: `model` is no module.
    """
    _check_model(model)
    dense: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter.data, CodecTensor):
                if id(parameter) not in dense:
                    try:
                        weight = parameter.data.dequantize()
                    except CodecError as error:
                        full_name = f"{path}.{name}".lstrip(".")
                        raise type(error)(f"{full_name}: {error}") from None
                    dense[id(parameter)] = nn.Parameter(weight, requires_grad=False)
                setattr(module, name, dense[id(parameter)])
        restore_repr(module)
    return model
