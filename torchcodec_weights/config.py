"""CodecWeightOnlyConfig: what to encode weights with, as torchao's `quantize_` takes it."""

import operator
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from torchao.core.config import AOBaseConfig

from torchcodec_weights.codecs.base import BaseCodec, LosslessCodec
from torchcodec_weights.codecs.records import EncoderSettings
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.encoder.rate import Target
from torchcodec_weights.matrix.importance import Importance


@dataclass
class CodecWeightOnlyConfig(AOBaseConfig):
    """Hold the weights of a module as bitstreams; see `codec_weight_only`."""

    codec: str = "ectcq"
    bits: float | None = None
    step: float | None = None
    snr_db: float | None = None
    preset: str | None = None
    profile: str | None = None
    bit_depth: int | None = None
    encoder_params: dict[str, str] = field(default_factory=dict)
    tile_shape: list[int] | None = None
    tile_steps: str = "uniform"

    _importance: ClassVar[Importance | None] = None

    @property
    def importance(self) -> Importance | None:
        """What `calibrate` found of the weight's rows and columns, if this comes from there.

        It is no field: copies keep it, files do not, and two configurations are equal without it.
        """
        return self._importance

    def with_importance(
        self, importance: Importance | None, bits: float
    ) -> "CodecWeightOnlyConfig":
        """A copy for one weight, whose steps follow the importance of its rows and columns."""
        changed = replace(self, bits=bits)
        object.__setattr__(changed, "_importance", importance)
        return changed

    def __getstate__(self) -> dict[str, Any]:
        # Torch saves configurations with models, and torch.load(weights_only=True) must take them.
        return {name: value for name, value in vars(self).items() if name != "_importance"}

    def __copy__(self) -> "CodecWeightOnlyConfig":
        changed = replace(self)
        object.__setattr__(changed, "_importance", self._importance)
        return changed

    def __deepcopy__(self, memo: dict[int, Any]) -> "CodecWeightOnlyConfig":
        changed = copy(self)
        changed.encoder_params = dict(self.encoder_params)
        changed.tile_shape = None if self.tile_shape is None else list(self.tile_shape)
        return changed

    def __post_init__(self) -> None:
        # Plain Python values, so that the configuration goes to JSON, and is unpickled by
        # torch.load with weights_only.
        self.bits, self.step, self.snr_db = (
            _number(name, getattr(self, name)) for name in ("bits", "step", "snr_db")
        )
        self.bit_depth = None if self.bit_depth is None else _integer("bit_depth", self.bit_depth)
        self.encoder_params = _parameters(self.encoder_params)
        self.tile_shape = _tile_shape(self.tile_shape)
        given = {
            name: value
            for name in ("bits", "step", "snr_db")
            if (value := getattr(self, name)) is not None
        }
        lossless = isinstance(get_codec(self.codec), LosslessCodec)
        if lossless and given:
            raise ValueError(
                f"bits, step and snr_db: none may be given with codec {self.codec!r}, which keeps "
                f"every bit; got {given}"
            )
        if not lossless and len(given) != 1:
            raise ValueError(
                f"bits, step and snr_db: exactly one must be given, got {given or 'none'}"
            )
        self.resolve()

    def resolve(self) -> tuple[BaseCodec, Target | None, EncoderSettings]:
        """The codec, the target and the codec's settings that this stands for.

        A lossless codec has no target.

        Raises:
            ValueError: unknown codec or setting; names what is allowed.
        """
        codec = get_codec(self.codec)
        if self.tile_steps not in ("uniform", "adaptive"):
            raise ValueError(f"tile_steps={self.tile_steps!r}: allowed: 'uniform', 'adaptive'")
        shape = None
        if self.tile_shape is not None:
            shape = self.tile_shape[0], self.tile_shape[1]
        settings = EncoderSettings(
            self.preset,
            self.profile,
            self.bit_depth,
            self.encoder_params,
            shape,
            self.tile_steps == "adaptive",
        )
        codec.validate(settings)
        if self.bits is not None:
            return codec, Target("bits", self.bits), settings
        if self.step is not None:
            return codec, Target("step", self.step), settings
        if self.snr_db is not None:
            return codec, Target("snr_db", self.snr_db), settings
        return codec, None, settings


def _number(name: str, value: Any) -> float | None:
    """A number above 0 as Python's own; NumPy's and those in tensors of no dimension are taken."""
    if value is None:
        return None
    number = value
    if isinstance(value, Tensor | np.generic | np.ndarray) and value.ndim == 0:
        number = None if getattr(value, "is_meta", False) else value.item()
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError(f"{name}={value!r}: allowed: a number above 0")
    if not 0 < number < float("inf"):
        raise ValueError(f"{name}={value!r}: allowed: finite numbers above 0")
    if number > sys.float_info.max:
        raise ValueError(f"{name}: allowed: numbers up to {sys.float_info.max:g}")
    return float(number) if isinstance(number, float) else number


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool | np.bool_ | Tensor):
        raise ValueError(f"{name}={value!r}: allowed: integers")
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: allowed: integers") from None


def _parameters(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(
            f"encoder_params={value!r}: allowed: a dictionary of names to values, or None"
        )
    for name, setting in value.items():
        text = isinstance(setting, str | int | float) and not isinstance(setting, bool)
        if not isinstance(name, str) or not text:
            raise ValueError(
                f"encoder_params={dict(value)!r}: allowed: names with strings or numbers as "
                f"values, not {name!r}: {setting!r}"
            )
    return {name: str(setting) for name, setting in value.items()}


def _tile_shape(value: Any) -> list[int] | None:
    if value is None:
        return None
    message = f"tile_shape={value!r}: allowed: two integers above 0, rows and columns, or None"
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str) or len(value) != 2:
        raise ValueError(message)
    try:
        sides = [_integer("tile_shape", side) for side in value]
    except ValueError:
        raise ValueError(message) from None
    if min(sides) < 1:
        raise ValueError(message)
    return sides


def codec_weight_only(
    codec: str = "ectcq",
    bits: float | None = None,
    *,
    step: float | None = None,
    snr_db: float | None = None,
    preset: str | None = None,
    profile: str | None = None,
    bit_depth: int | None = None,
    encoder_params: Mapping[str, str | float] | None = None,
    tile_shape: Sequence[int] | None = None,
    tile_steps: str = "uniform",
) -> CodecWeightOnlyConfig:
    """Configuration that holds Linear weights as bitstreams of a codec.

    Exactly one of `bits`, `step` and `snr_db` is given; none with the codec "lossless", whose
    weights decode to the bits that they were.

    Args:
        codec: one of `available_codecs()`.
        bits: bits per weight with everything counted: payloads, headers, tables, checksums,
            scales, outliers. The result is at most this, and more than this − 0.03 for matrices
            of 65,536 weights or more.
        step: quantization step in standard deviations of the normalized weight.
        snr_db: energy of the weights over energy of the error, in dB; reached to within 0.2 dB.
        preset: time against quality, one of the codec's presets. For `ectcq` it is the effort of
            the encoder: "fast", "medium" and "best" search 8, 64 and 256 states.
        profile: one of the codec's profiles.
        bit_depth: bits per sample, for codecs of samples.
        encoder_params: raw parameters for a video encoder by its own names, for experiments. What
            the encoder refuses raises ValueError here, if it is installed, and when weights are
            encoded. A number out of range that the encoder clips itself, as x264 and libvvenc do
            with some, cannot be noticed. The other codecs have no such parameters.
        tile_shape: rows and columns of the blocks that are coded alone, for lossy codecs; None for
            whole rows, as many as suit the codec.
        tile_steps: "uniform", one step for all tiles, or "adaptive", for codecs of samples: finer
            where scales are large, so that the weight's squared error is the least for its bits.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    config = CodecWeightOnlyConfig(
        codec,
        bits,
        step,
        snr_db,
        preset,
        profile,
        bit_depth,
        cast(dict[str, str], encoder_params),
        cast(list[int] | None, tile_shape),
        tile_steps,
    )
    kind, _, settings = config.resolve()
    kind.check_parameters(settings)
    return config


torch.serialization.add_safe_globals([CodecWeightOnlyConfig])
