"""Decoders of codecs on a device, and which of them is taken.

A codec of samples may have a `DeviceDecoder` besides the one on the CPU. It is taken where it is
there, takes the stream, and returns bit for bit what the CPU's decoder returns; else the CPU
decodes.
"""

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchcodec_weights.codecs.base import (
    BaseCodec,
    CodecError,
    CodecUnavailableError,
    SampleCodec,
)

if TYPE_CHECKING:
    from torchcodec_weights.codecs.base import CodecInfo


class DeviceDecoderError(CodecError):
    """A decoder of a device failed on a stream, or returned other samples than the CPU's."""


class Samples(NamedTuple):
    """A decoded picture.

    Attributes:
        values: (height, width), integers of any dtype, on the device.
        depth: bits per sample.
    """

    values: Tensor
    depth: int


class DeviceDecoder(ABC):
    """Decodes pictures of `SampleCodec`s on CUDA devices.

    Attributes:
        name: as it shows in `available_codecs()` and in reports.
    """

    name: ClassVar[str]

    def exact(self, codec: SampleCodec) -> bool:
        """Whether it returns the samples that the CPU's decoder returns.

        Where not, it is taken only if `use_decoder` forces it.
        """
        return True

    @abstractmethod
    def missing(self, codec: SampleCodec, device: torch.device) -> str | None:
        """Why a device cannot decode a codec: package, driver or chip. None if it can."""

    def refusal(self, codec: SampleCodec, payload: bytes, device: torch.device) -> str | None:
        """Why a stream cannot be decoded, of a codec that can be: size or depth. None if it can."""
        return None

    @abstractmethod
    def decode(
        self, codec: SampleCodec, payloads: Sequence[bytes], device: torch.device
    ) -> list[Samples]:
        """Decode streams of one picture each, none of which `refusal` speaks against.

        Returns:
            Their pictures, which the current stream may use at once.

        Raises:
            DeviceDecoderError: a stream was not decoded.
        """


FORCED = "use_decoder says so"

_lock = threading.Lock()
_choices: dict[str, str] = {}
_failures: dict[tuple[str, torch.device], str] = {}
_warned: set[tuple[str, str]] = set()


def chosen(codec: str) -> str | None:
    """ "cpu" or "cuda" where `use_decoder` forces one, else None."""
    return _choices.get(codec)


def choose(codec: str, decoder: str | None) -> None:
    """Force a decoder, or none. Failures are forgotten: they may have had a cause that is gone."""
    with _lock:
        if decoder is None:
            _choices.pop(codec, None)
        else:
            _choices[codec] = decoder
        for key in [key for key in _failures if key[0] == codec]:
            del _failures[key]


def give_up(codec: str, device: torch.device, reason: str) -> None:
    """Have the CPU decode a codec from now on, as a device's decoder failed."""
    with _lock:
        _failures[codec, device] = reason


def select(codec: BaseCodec, payload: bytes, device: torch.device) -> DeviceDecoder | None:
    """The device's decoder for a stream, or None where the CPU is to decode it.

    Warns, once for each codec and reason, where there is such a decoder and it cannot be taken.

    Raises:
        CodecUnavailableError: `use_decoder` forces the device's decoder, which cannot be taken.
    """
    if not isinstance(codec, SampleCodec) or codec.device_decoder is None:
        return None
    decoder = codec.device_decoder
    reason = _reason(codec, decoder, payload, device)
    if reason is None:
        return decoder
    choice = chosen(codec.name)
    if choice == "cuda" or (choice is None and decoder.exact(codec)):
        fall_back(codec.name, decoder.name, device, reason)
    return None


def fall_back(codec: str, decoder: str, device: torch.device, reason: str) -> None:
    """Warn, once for each codec and reason, that the CPU decodes instead of a device's decoder.

    Raises:
        CodecUnavailableError: `use_decoder` forces the device's.
    """
    if chosen(codec) == "cuda":
        raise CodecUnavailableError(
            f"codec {codec!r} was to be decoded by {decoder} on {device}: {reason}; "
            f"use_decoder({codec!r}, None) lets the CPU decode it"
        )
    warn_once(codec, reason)


def warn_once(codec: str, reason: str) -> None:
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


def _reason(
    codec: SampleCodec, decoder: DeviceDecoder, payload: bytes | None, device: torch.device
) -> str | None:
    """Why the device's decoder is not taken, None if it is."""
    choice = chosen(codec.name)
    if choice == "cpu":
        return FORCED
    if choice is None and not decoder.exact(codec):
        return (
            f"{decoder.name} decodes it to other samples than the CPU; "
            f"use_decoder({codec.name!r}, 'cuda') takes it"
        )
    missing = decoder.missing(codec, device)
    if missing is not None:
        return missing
    if choice is None and (codec.name, device) in _failures:
        return _failures[codec.name, device]
    return None if payload is None else decoder.refusal(codec, payload, device)


def decoder_name(codec: BaseCodec, device: torch.device, payload: bytes | None = None) -> str:
    """What decodes a codec for a device, for a reader.

    Args:
        payload: a stream, if it is to be said of this stream and not of the codec.
    """
    return _name(codec, codec.info(), device, payload)


def with_cuda(codec: BaseCodec, info: "CodecInfo", device: torch.device) -> dict[str, str]:
    """The decoders of a codec by device type, with what decodes it for a CUDA device."""
    if not info.decoders:
        return {}
    return {**info.decoders, "cuda": _name(codec, info, device, None)}


def _name(codec: BaseCodec, info: "CodecInfo", device: torch.device, payload: bytes | None) -> str:
    host = info.decoders.get("cpu")
    if host is None:
        return f"none: {info.missing}"
    if device.type == "cpu":
        return host
    if device.type in info.decoders and chosen(codec.name) != "cpu":
        return info.decoders[device.type]
    reason = FORCED if chosen(codec.name) == "cpu" else None
    if (
        device.type == "cuda"
        and isinstance(codec, SampleCodec)
        and codec.device_decoder is not None
    ):
        reason = _reason(codec, codec.device_decoder, payload, device)
        if reason is None:
            return codec.device_decoder.name
    return uploaded(host, reason)


def uploaded(decoder: str, reason: str | None) -> str:
    """Name of a decoder of the CPU for a device, with why it is taken where that is not plain."""
    return f"{decoder} on the CPU, uploaded" + (f" ({reason})" if reason else "")
