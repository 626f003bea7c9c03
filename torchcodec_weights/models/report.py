"""Reports on compressed models, weight by weight, and conversion back to dense weights."""

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any

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
from torchcodec_weights.models.table import Table, WeightReport
from torchcodec_weights.pages.document import write_page
from torchcodec_weights.pages.model import Layer, Totals, Unencoded, model_page, size
from torchcodec_weights.tensor import CodecTensor

_PICTURES = 8
"""Weights whose tile is in the page, which would be many megabytes with those of all."""


@dataclass(frozen=True)
class Report(Table):
    """All encoded weights of a model, with totals; prints as a table.

    It refers to the tensors, for `to_html`.

    Attributes:
        weights: the encoded weights.
        other_bytes: bytes of all parameters and buffers that are not encoded.
    """

    _coded: tuple[CodecTensor, ...] = field(default=(), repr=False, compare=False)
    _others: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

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
        kept = _kept(tensor)
        weights.append(
            WeightReport.of(
                name,
                data.header,
                data.resolved_window,
                dtype_name(data.dtype),
                data.stored_bytes,
                _decoder(data),
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
