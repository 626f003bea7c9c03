"""Who decodes a matrix, and where: the first decoder of a device that takes it, else the CPU.

One place chooses, falls back, remembers what failed, warns once, and gives the names for
`available_codecs()` and reports.
"""

import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from torchcodec_weights.codecs.base import BaseCodec
from torchcodec_weights.codecs.common.cuda import capturing
from torchcodec_weights.codecs.decoder import Decoder
from torchcodec_weights.codecs.pictures import SampleCodec
from torchcodec_weights.codecs.records import CodecInfo
from torchcodec_weights.codecs.registry import codec_info, codec_names, get_codec
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
    """Decode a part of a matrix for a device, by the decoder that is best there.

    Args:
        threads: how many to use on the CPU, by default as many as PyTorch.

    Returns:
        (window.rows, window.cols) of `dtype` on `device`, contiguous. On a CUDA device the current
        stream may use it at once, others must wait for that.

    Raises:
        CodecError: a tile is corrupt, or a CUDA graph is captured and the codec needs the host.
        CodecUnavailableError: `use_decoder` forces a decoder that cannot be taken.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    # What is decoded may be kept, and used in another mode than the caller's.
    with _on(device), torch.inference_mode(False), torch.no_grad():
        weight = _first(
            matrix, window, device, "decode", lambda d: d.decode(matrix, window, dtype, device)
        )
        if weight is not None:
            return weight
        _refuse_capture(matrix, device)
        return cpu.decode_for(matrix, window, dtype, device, threads)


def multiply(matrix: OpenedMatrix, window: Window, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """x @ W.T + bias without ever storing W; None where W is to be decoded instead.

    That is so for many tokens, and for codecs, dtypes and rows that do not suit the kernels.

    Args:
        x: (tokens, window.cols); where it is, the product is made.
        bias: (window.rows,) of x's dtype, or None.

    Returns:
        (tokens, window.rows) of x's dtype.

    Raises:
        CodecError: a tile is corrupt, or a CUDA graph is captured and the weight was never used.
    """
    with _on(x.device), torch.no_grad():
        product = _first(
            matrix, window, x.device, "multiply", lambda d: d.multiply(matrix, window, x, bias)
        )
    if product is not None or x.device.type != "cpu" or not matrix.decodes_whole:
        return product
    product = cpu.multiply_matrix(matrix, window, x)
    if bias is not None:
        product += bias
    return product


def rows(matrix: OpenedMatrix, window: Window, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a part of a matrix, on the device of the indices.

    Args:
        indices: integers of any shape. The host waits for them, as which tiles to decode depends on
            them, unless kernels of the device find the rows.

    Returns:
        (indices.numel(), window.cols) of `dtype`.

    Raises:
        IndexError: an index lies outside of the window's rows. Kernels of the device end with an
            error instead that CUDA reports later, as PyTorch's own embedding does.
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
    """As `decode`, but in a stream of its own, and done: to be kept, and used in any stream.

    The calling thread waits for that stream, not for the device. Users must call
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
    """Decoders of a device for a codec, the best first; the CPU's is not among them."""
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
    """What the first decoder that takes a matrix makes of it; None where it is the CPU's turn.

    Args:
        method: which of the decoder's methods `use` calls; those that do not have it are passed by.
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
        elif _choices.get(name) != "cpu" and decoder.exact:
            _warn_once(name, reason)
    return None


def _reason(codec: BaseCodec, decoder: Decoder, device: torch.device) -> str | None:
    """Why a decoder is not taken for a codec, whatever the matrix; None if it is."""
    choice = _choices.get(codec.name)
    if choice == "cpu":
        return _FORCED
    if choice is None and not decoder.exact:
        return (
            f"{decoder.name} decodes it to other samples than the CPU; "
            f"use_decoder({codec.name!r}, 'cuda') takes it"
        )
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


def decoder_name(codec: BaseCodec, device: torch.device, matrix: OpenedMatrix | None = None) -> str:
    """What decodes a codec for a device, for a reader.

    Args:
        matrix: one of the codec, if it is to be said of this one; all of it.
    """
    return _name(codec, codec.info(), device, matrix)


def _name(
    codec: BaseCodec, info: CodecInfo, device: torch.device, matrix: OpenedMatrix | None
) -> str:
    host = info.decoders.get("cpu")
    if host is None:
        return f"none: {info.missing}"
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
    """What every known codec can do on this machine and, if it cannot, what to install.

    A codec of another package that cannot be loaded is listed without encoder and decoders, as
    lossy; `missing` names the package and the error.
    """
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    infos = []
    for name in codec_names():
        info = codec_info(name)
        for device in devices if info.decoders else ():
            info = with_device(get_codec(name), info, device)
        infos.append(info)
    return infos


def with_device(codec: BaseCodec, info: CodecInfo, device: torch.device) -> CodecInfo:
    """What a codec can do, with what decodes it for a device."""
    if not info.decoders:
        return info
    return replace(info, decoders={**info.decoders, device.type: _name(codec, info, device, None)})


def chosen(codec: str) -> str | None:
    """ "cpu" or "cuda" where `use_decoder` forces one, else None."""
    return _choices.get(codec)


def _choose(codec: str, decoder: str | None) -> None:
    """Force a decoder, or none. Failures are forgotten: they may have had a cause that is gone."""
    with _lock:
        if decoder is None:
            _choices.pop(codec, None)
        else:
            _choices[codec] = decoder
        for key in [key for key in _failures if key[0] == codec]:
            del _failures[key]


class use_decoder(Setting):  # noqa: N801 - used as a function
    """Force what decodes a codec's weights on CUDA devices, or leave the choice to the package.

    Takes effect at once and for the whole process; as a context manager it restores the former
    choice at the end. What is decoded already (`decoded_cache`) stays as it is.

    Args:
        codec: its name.
        decoder: "cpu", which decodes on the CPU's cores and uploads; "cuda", the decoder of the
            device, with an error where that is not possible; None, the default, which takes the
            device's where it is there and gives exactly what the CPU gives, and the CPU otherwise.

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
