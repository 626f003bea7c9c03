"""Reports on compressed models, weight by weight, and conversion back to dense weights."""

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import inf, isfinite, log10
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from torchcodec_weights.codecs.names import is_known
from torchcodec_weights.codecs.registry import codec_info
from torchcodec_weights.decoders.choice import decoder_name
from torchcodec_weights.decoders.resident import KEPT, KeptWeight, find
from torchcodec_weights.errors import CodecError, CodecUnavailableError
from torchcodec_weights.format.dtypes import dtype_name
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.opened import open_matrix
from torchcodec_weights.models.distribution import histogram, picture
from torchcodec_weights.models.quantize import restore_repr
from torchcodec_weights.pages.document import write_page
from torchcodec_weights.pages.model import Layer, Totals, Unencoded, model_page, size
from torchcodec_weights.system.terminal import printable
from torchcodec_weights.tensor import CodecTensor

_PICTURES = 8
"""Weights whose tile is in the page, which would be many megabytes with those of all."""


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

    It refers to the tensors, for `to_html`.

    Attributes:
        weights: the encoded weights.
        other_bytes: bytes of all parameters and buffers that are not encoded.
    """

    weights: tuple[WeightReport, ...]
    other_bytes: int
    _coded: tuple[CodecTensor, ...] = field(default=(), repr=False, compare=False)
    _others: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

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

    def to_html(
        self,
        path: str | PathLike[str],
        original: nn.Module | Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the report as a page: one file, which needs no network.

        It has bits and SNR by layer as charts, sizes on disk and in memory, what is not encoded,
        and for each layer the distribution of its weights and, of the first layers, a tile as its
        codec of pictures decodes it. For these every weight is decoded once, of those of more than
        2^22 weights the first rows.

        Args:
            path: the file, which is replaced if it exists.
            original: the model before, or its tensors by the same names, for the distributions
                before encoding.

        Raises:
            ValueError: `original` lacks a weight, or has it in another shape.
            CodecError: a bitstream is corrupt; names the weight.
            OSError: `path` cannot be written.
        """
        known = _named_tensors(original)
        layers = []
        for index, (row, weight) in enumerate(zip(self.weights, self._coded, strict=True)):
            before = None if known is None else _before(known, row.name, weight)
            try:
                layers.append(_layer(row, weight, before, index < _PICTURES))
            except CodecError as error:
                raise type(error)(f"{row.name}: {error}") from None
        others = [
            Unencoded(name, _shape(tensor), str(tensor.dtype).removeprefix("torch."), tensor.nbytes)
            for name, tensor in self._others.items()
        ]
        totals = Totals(
            self.bits_per_weight, self.stored_bytes, self.dense_bytes, self.resident_bytes
        )
        write_page(Path(path), model_page(layers, others, totals))

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
    weights: list[WeightReport] = []
    coded: list[CodecTensor] = []
    others: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        data = tensor.data if isinstance(tensor, nn.Parameter) else tensor
        if not isinstance(data, CodecTensor):
            others[name] = data
            continue
        coded.append(data)
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
                _decoder(data, header.codec),
                *((kept.form, kept.nbytes, kept.snr_db) if kept else ()),
            )
        )
    other_bytes = sum(tensor.nbytes for tensor in others.values())
    return Report(tuple(weights), other_bytes, tuple(coded), others)


def _named_tensors(
    original: nn.Module | Mapping[str, Tensor] | None,
) -> Mapping[str, Tensor] | None:
    if isinstance(original, nn.Module):
        return dict([*original.named_parameters(), *original.named_buffers()])
    if original is None or isinstance(original, Mapping):
        return original
    raise ValueError(
        f"original={reprlib.repr(original)}: allowed: a torch.nn.Module, a dict of tensors, None"
    )


def _before(known: Mapping[str, Tensor], name: str, weight: CodecTensor) -> Tensor:
    before = known.get(name)
    if not isinstance(before, Tensor) or before.shape != weight.shape:
        found = f"in the shape {tuple(before.shape)}" if isinstance(before, Tensor) else "not there"
        raise ValueError(
            f"original: {name} is {found}: allowed: the model that was encoded, where it has the "
            f"shape {tuple(weight.shape)}"
        )
    return before


def _layer(
    row: WeightReport, weight: CodecTensor, before: Tensor | None, with_picture: bool
) -> Layer:
    shape = _shape(weight)
    facts = [
        ("shape", f"{shape}, {dtype_name(weight.dtype)}"),
        ("codec", row.codec),
        ("bits per weight", f"{row.bits_per_weight:.3f}"),
        ("SNR", _decibel(row.snr_db) if row.lossy else "exact"),
        ("stored", size(row.stored_bytes)),
        ("dense", size(row.dense_bytes)),
        ("tiles", f"{row.tiles:,}"),
        ("decoder", row.decoder),
    ]
    if row.resident_bytes:
        facts += [
            ("resident", f"{row.resident}, {size(row.resident_bytes)}"),
            ("SNR as resident", _decibel(row.used_snr_db)),
        ]
    bins = tile = None
    if is_known(row.codec):
        try:
            bins = histogram(weight, before)
            tile = picture(weight) if with_picture else None
        except CodecUnavailableError:
            pass  # the page says so
    return Layer(
        row.name,
        shape,
        row.codec,
        row.bits_per_weight,
        row.used_snr_db,
        row.stored_bytes,
        tuple(facts),
        bins,
        tile,
    )


def _shape(tensor: Tensor) -> str:
    return " × ".join(map(str, tensor.shape)) or "1"


def _decibel(value: float) -> str:
    return f"{value:.2f} dB" if isfinite(value) else "exact"


def _kept(weight: Tensor) -> KeptWeight | None:
    if not KEPT or not isinstance(weight, CodecTensor) or not is_known(weight.codec):
        return None
    return find(open_matrix(*weight.coded), Window(*weight.resolved_window), weight.device)


def _decoder(weight: CodecTensor, name: str) -> str:
    device = weight.qdata.device
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
