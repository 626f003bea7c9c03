"""`resident`: in which form a model's weights are in memory, and so how fast they are used."""

import reprlib
from math import inf, log10
from typing import Any

from torch import nn

from torchcodec_weights.decoders import resident as forms
from torchcodec_weights.decoders.resident import FORMS
from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.opened import OpenedMatrix, open_matrix
from torchcodec_weights.models.report import Report, compression_report
from torchcodec_weights.system.byte_count import byte_count
from torchcodec_weights.tensor import CodecTensor

_MOST_LOSS_DB = 0.5
"""What a weight in the form "int8" that a budget chose may lose of its SNR."""


def resident(
    model: nn.Module, form: str | None = None, *, budget: float | str | None = None
) -> Report:
    """Keep a model's encoded weights in memory in a form that is used faster than their bitstreams.

    The weights stay CodecTensors, and the bitstreams stay in memory beside what is kept: saving,
    slicing and `dequantize()` are the same. What is kept is dropped where a weight is written to,
    moved or copied: call this again after `.to()`, `load_state_dict` or `copy.deepcopy`. It is for
    weights on the CPU.

    "bits", the default of all weights, decodes at each use. "int8" keeps a level of 8 bits for each
    weight, with the scales of the bitstream and a step for each row, for products in float32
    arithmetic that read a quarter of a float32 weight's memory; the levels' error is added to the
    codec's, and `Report` has it. "dense" keeps the decoded weights, in their dtype.

    With a budget, weights are kept as "int8" as long as there is room, in the order of the model;
    those that are only looked up (`nn.Embedding`) come last, as a step needs few of their rows. A
    weight of which int8 would cost more than 0.5 dB of SNR is kept "dense", if there is room: a
    lossless one, or one of more than about 5 bits.

    Args:
        model: weights that are no CodecTensors are left as they are.
        form: "bits", "int8" or "dense", for all encoded weights; None with a budget.
        budget: bytes of what is kept beside the bitstreams, a number or with a unit as in
            `decoded_cache`: "512 MiB".

    Returns:
        `compression_report(model)`, which has the form of each weight, its bytes and its error.

    Raises:
        ValueError: an argument has a wrong type or value, both or neither of `form` and `budget`
            are given, or a weight is not on the CPU. Raised before anything is changed.
        CodecError: a bitstream is corrupt; names the parameter. The weights before it are kept.
        CodecUnavailableError: "int8" needs the compiled library, which is missing.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={reprlib.repr(model)}: allowed: a torch.nn.Module")
    if (form is None) == (budget is None):
        raise ValueError(f"form={form!r}, budget={budget!r}: allowed: one of the two")
    if form is not None and form not in FORMS:
        raise ValueError(f"form={reprlib.repr(form)}: allowed: {', '.join(map(repr, FORMS))}")
    most = None if budget is None else byte_count("budget", budget, zero="bits for all")
    weights = _weights(model)
    for name, weight in weights.items():
        if weight.device.type != "cpu" and form != "bits":
            raise ValueError(
                f"{name} is on {weight.device}: allowed: weights on the CPU; for others "
                "decoded_cache(max_bytes) keeps decoded ones"
            )
    left = inf if most is None else most
    for name, weight in weights.items():
        matrix, window = open_matrix(*weight.coded), Window(*weight.resolved_window)
        forms.forget(matrix, window)
        try:
            kept = _kept(matrix, window, weight, form, left)
        except CodecError as error:
            raise type(error)(f"{name}: {error}") from None
        if kept is not None:
            forms.keep(matrix, kept)
            left -= kept.nbytes
    return compression_report(model)


def _weights(model: nn.Module) -> dict[str, CodecTensor]:
    """Names to encoded weights, each once; those that only embeddings have are last."""
    found: dict[int, tuple[str, CodecTensor]] = {}
    multiplied: set[int] = set()
    for path, module in model.named_modules():
        tensors: list[tuple[str, Any]] = [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]
        for name, tensor in tensors:
            if isinstance(tensor, CodecTensor):
                found.setdefault(id(tensor), (f"{path}.{name}".lstrip("."), tensor))
                if not isinstance(module, nn.Embedding):
                    multiplied.add(id(tensor))
    return dict(sorted(found.values(), key=lambda pair: id(pair[1]) not in multiplied))


def _kept(
    matrix: OpenedMatrix, window: Window, weight: CodecTensor, form: str | None, left: float
) -> forms.KeptWeight | None:
    """A weight in a form, or in one that a budget of `left` bytes has room for; None for bits."""
    if form == "bits":
        return None
    if form is not None:
        return forms.make(matrix, window, form, weight.logical_dtype)
    count = window.rows * window.cols
    if count > left:
        return None
    kept = forms.make(matrix, window, "int8", weight.logical_dtype)
    if _lost_db(matrix.header.snr_db, kept.snr_db) > _MOST_LOSS_DB:
        if count * weight.logical_dtype.itemsize > left:
            return None
        kept = forms.make(matrix, window, "dense", weight.logical_dtype)
    return kept if kept.nbytes <= left else None


def _lost_db(own: float, levels: float) -> float:
    """SNR that a weight of an SNR loses by another error, in dB."""
    return inf if own == inf else 10 * log10(1 + 10 ** ((own - levels) / 10))
