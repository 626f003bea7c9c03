"""Choice of the decoder of a matrix: the first of the device that accepts it, else the CPU.

This module alone chooses decoders, falls back to the next, remembers failures, warns once, and
names decoders for `available_codecs()` and reports.
"""

import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from torchcodec_weights.codecs import device_decoders  # noqa: F401 - sets those of codecs
from torchcodec_weights.codecs.base import BaseCodec
from torchcodec_weights.codecs.common.cuda import capturing
from torchcodec_weights.codecs.decoder import Decoder
from torchcodec_weights.codecs.names import codec_names
from torchcodec_weights.codecs.pictures import SampleCodec
from torchcodec_weights.codecs.records import CodecInfo
from torchcodec_weights.codecs.registry import codec_info, get_codec
from torchcodec_weights.decoders import cpu
from torchcodec_weights.decoders.pictures import picture_decoder
from torchcodec_weights.decoders.transfer import stream_of
from torchcodec_weights.errors import CodecError, CodecUnavailableError, DecoderError
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.opened import OpenedMatrix
from torchcodec_weights.system.setting import Setting

_FORCED = "use_decoder says so"

_lock = threading.Lock()
_choices: dict[str, str] = {}  # what use_decoder forces, by codec
_failures: dict[tuple[str, str, torch.device], str] = {}  # by codec, decoder and device
_warned: set[tuple[str, str]] = set()


def decode(
    matrix: OpenedMatrix,
    window: Window,
    dtype: torch.dtype,
    device: torch.device,
    threads: int | None = None,
) -> Tensor:
    """Decode a window of a matrix for a device, by the best decoder of the device.

    Args:
        threads: how many to use on the CPU, by default as many as PyTorch.

    Returns:
        (window.rows, window.cols) of `dtype` on `device`, contiguous. On a CUDA device the current
        stream may use it at once; other streams must wait for the current one.

    Raises:
        CodecError: a tile is corrupt, or a CUDA graph is captured and the codec needs the host.
        CodecUnavailableError: `use_decoder` forces a decoder that cannot be used.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    # The weight may be cached, and used later in another mode than the caller's.
    with _on(device), torch.inference_mode(False), torch.no_grad():
        weight = _first(
            matrix, window, device, "decode", lambda d: d.decode(matrix, window, dtype, device)
        )
        if weight is not None:
            return weight
        _refuse_capture(matrix, device)
        return cpu.decode_for(matrix, window, dtype, device, threads)


def multiply(matrix: OpenedMatrix, window: Window, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """x @ W.T + bias without storing W; None if W is to be decoded instead.

    None for many tokens, and for codecs, dtypes and row lengths that the kernels do not support.

    Args:
        x: (tokens, window.cols); the product is computed on its device.
        bias: (window.rows,) of x's dtype, or None.

    Returns:
        (tokens, window.rows) of x's dtype.

    Raises:
        CodecError: a tile is corrupt, or a CUDA graph is captured and the weight was never used.
    """
    if not (x.is_cpu and matrix.has_cpu_alone):
        device = x.device
        with _on(device), torch.no_grad():
            product = _first(
                matrix, window, device, "multiply", lambda d: d.multiply(matrix, window, x, bias)
            )
        if product is not None or not x.is_cpu or not matrix.decodes_whole:
            return product
    return cpu.multiply_matrix(matrix, window, x, bias)


def rows(matrix: OpenedMatrix, window: Window, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a window of a matrix, on the device of the indices.

    Args:
        indices: integers of any shape. Unless kernels of the device gather the rows, the host waits
            for the indices, which decide the tiles to decode.

    Returns:
        (indices.numel(), window.cols) of `dtype`.

    Raises:
        IndexError: an index is outside the window's rows. If kernels of the device gather the rows,
            CUDA reports the error at a later call instead, as with PyTorch's own embedding.
        CodecError: a tile is corrupt, or a CUDA graph is captured and the codec needs the host.
    """
    device = indices.device
    with _on(device), torch.inference_mode(False):
        found = _first(
            matrix, window, device, "rows", lambda d: d.rows(matrix, window, indices, dtype)
        )
        if found is not None:
            return found
        _refuse_capture(matrix, device)
        return cpu.rows_for(matrix, window, indices, dtype)


def decode_complete(
    matrix: OpenedMatrix,
    window: Window,
    dtype: torch.dtype,
    device: torch.device,
    threads: int | None = None,
) -> Tensor:
    """As `decode`, but in a separate stream and completed at return, so that any stream may use it.

    The calling thread waits for that stream, not for the whole device. Before each use, call
    `transfer.use_here`.
    """
    if device.type != "cuda":
        return decode(matrix, window, dtype, device, threads)
    stream = stream_of(device, "decode")
    with torch.cuda.device(device), torch.cuda.stream(stream):
        weight = decode(matrix, window, dtype, device, threads)
        stream.record_event(torch.cuda.Event(blocking=True)).synchronize()
    return weight


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _offered(codec: BaseCodec, device: torch.device) -> Sequence[Decoder]:
    """Decoders of a device for a codec, the best first, without the CPU's."""
    offered = list(codec.decoders(device))
    if device.type == "cuda" and isinstance(codec, SampleCodec) and codec.device_decoder:
        offered.append(picture_decoder(codec, codec.device_decoder))
    return offered


def _first(
    matrix: OpenedMatrix,
    window: Window,
    device: torch.device,
    method: str,
    use: Callable[[Decoder], Tensor | None],
) -> Tensor | None:
    """The result of the first decoder that accepts a matrix; None if the CPU is to decode it.

    Args:
        method: name of the method that `use` calls; decoders without it are skipped.
    """
    name = matrix.codec.name
    for decoder in _offered(matrix.codec, device):
        if getattr(type(decoder), method) is getattr(Decoder, method):
            continue
        reason = _reason(matrix.codec, decoder, device)
        if reason is None and not decoder.graph_safe:
            _refuse_capture(matrix, device)
        reason = reason or decoder.refusal(matrix, window, device)
        if reason is None:
            try:
                return use(decoder)
            except DecoderError as error:
                if _choices.get(name) == "cuda":
                    raise
                with _lock:
                    _failures[name, decoder.name, device] = str(error)
                _warn_once(name, str(error))
        elif _choices.get(name) == "cuda":
            raise CodecUnavailableError(
                f"codec {name!r} was to be decoded by {decoder.name} on {device}: {reason}; "
                f"use_decoder({name!r}, None) lets the CPU decode it"
            )
        elif _choices.get(name) != "cpu":
            _warn_once(name, reason)
    return None


def _reason(codec: BaseCodec, decoder: Decoder, device: torch.device) -> str | None:
    """Why a decoder is not used for any matrix of a codec; None if it is used."""
    choice = _choices.get(codec.name)
    if choice == "cpu":
        return _FORCED
    missing = decoder.missing(device)
    if missing is None and choice is None:
        return _failures.get((codec.name, decoder.name, device))
    return missing


def _refuse_capture(matrix: OpenedMatrix, device: torch.device) -> None:
    if capturing(device):
        raise CodecError(
            f"a weight in {matrix.codec.name!r} cannot be decoded while a CUDA graph is captured, "
            "as that takes the host: run the model once before, under a decoded_cache(max_bytes) "
            "that has room for all decoded weights"
        )


def _warn_once(codec: str, reason: str) -> None:
    """Warn that the CPU decodes a codec, once in a process for each codec and reason."""
    with _lock:
        if (codec, reason) in _warned:
            return
        _warned.add((codec, reason))
    warnings.warn(
        f"codec {codec!r} is decoded on the CPU and uploaded: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def decoder_name(codec: str, device: torch.device, matrix: OpenedMatrix | None = None) -> str:
    """Name of the decoder of a codec for a device, as shown to users.

    Args:
        codec: name of a known codec, which need not be available.
        matrix: of the codec; None for any matrix.
    """
    return _name(codec_info(codec), device, matrix)


def _name(info: CodecInfo, device: torch.device, matrix: OpenedMatrix | None) -> str:
    host = info.decoders.get("cpu")
    if host is None:
        return f"none: {info.missing}"
    codec = get_codec(info.name)
    reason = None
    for decoder in _offered(codec, device):
        reason = _reason(codec, decoder, device)
        if reason is None and matrix is not None:
            window = Window(0, matrix.header.rows, 0, matrix.header.cols)
            reason = decoder.refusal(matrix, window, device)
        if reason is None:
            return decoder.name
    if device.type == "cpu":
        return host
    return f"{host} on the CPU, uploaded" + (f" ({reason})" if reason else "")


def available_codecs() -> list[CodecInfo]:
    """What every known codec can do on this machine, and what to install for the rest.

    A codec of another package that cannot be loaded has no encoder and no decoders and counts as
    lossy; `missing` names the package and the error.
    """
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    infos = []
    for name in codec_names():
        info = codec_info(name)
        for device in devices if info.decoders else ():
            info = with_device(info, device)
        infos.append(info)
    return infos


def with_device(info: CodecInfo, device: torch.device) -> CodecInfo:
    """`info` with the name of the codec's decoder for a device added."""
    if not info.decoders:
        return info
    return replace(info, decoders={**info.decoders, device.type: _name(info, device, None)})


def chosen(codec: str) -> str | None:
    """ "cpu" or "cuda" where `use_decoder` forces one, else None."""
    return _choices.get(codec)


def _choose(codec: str, decoder: str | None) -> None:
    """Force a decoder, or none. Forgets failures, as their cause may have been removed."""
    with _lock:
        if decoder is None:
            _choices.pop(codec, None)
        else:
            _choices[codec] = decoder
        for key in [key for key in _failures if key[0] == codec]:
            del _failures[key]


class use_decoder(Setting):  # noqa: N801 - used as a function
    """Force the decoder of a codec's weights on CUDA devices, or leave the choice to the package.

    Takes effect at once and for the whole process; as a context manager it restores the former
    choice at the end. Weights that are already in `decoded_cache` are not decoded again.

    Args:
        codec: its name.
        decoder: "cpu" decodes on the CPU's cores and uploads; "cuda" uses the decoder of the
            device, and raises an error if that is not possible; None, the default, uses the
            device's decoder if it is available, and the CPU otherwise.

    Raises:
        ValueError: there is no such codec, or no such decoder of it.
    """

    def __init__(self, codec: str, decoder: str | None) -> None:
        on_device = _offered(get_codec(codec), torch.device("cuda"))
        allowed = ("cpu", "cuda", None) if on_device else ("cpu", None)
        if decoder not in allowed:
            raise ValueError(
                f"decoder={decoder!r} with codec {codec!r}: allowed: "
                f"{', '.join(map(repr, allowed))}"
            )
        super().__init__(partial(_choose, codec, chosen(codec)))
        _choose(codec, decoder)
