"""CodecWeightOnlyConfig: what to encode weights with, as torchao's `quantize_` takes it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torchao.core.config import AOBaseConfig

from torchcodec_weights.codecs.base import BaseCodec, EncoderSettings, LosslessCodec
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.rate import Target


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

    def __post_init__(self) -> None:
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
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name}={value!r}: allowed: a number")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value!r}: allowed: finite numbers above 0")
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
            if len(self.tile_shape) != 2 or any(
                not isinstance(side, int) or side < 1 for side in self.tile_shape
            ):
                raise ValueError(f"tile_shape={self.tile_shape!r}: allowed: two integers above 0")
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


def codec_weight_only(
    codec: str = "ectcq",
    bits: float | None = None,
    *,
    step: float | None = None,
    snr_db: float | None = None,
    preset: str | None = None,
    profile: str | None = None,
    bit_depth: int | None = None,
    encoder_params: dict[str, str] | None = None,
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
        encoder_params: raw parameters for the encoder by its own names, for experiments.
        tile_shape: rows and columns of the blocks that are coded alone, for lossy codecs; None for
            whole rows, as many as suit the codec.
        tile_steps: "uniform", one step for all tiles, or "adaptive", for codecs of samples: finer
            where scales are large, so that the weight's squared error is the least for its bits.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    return CodecWeightOnlyConfig(
        codec,
        bits,
        step,
        snr_db,
        preset,
        profile,
        bit_depth,
        dict(encoder_params or {}),
        None if tile_shape is None else list(tile_shape),
        tile_steps,
    )


torch.serialization.add_safe_globals([CodecWeightOnlyConfig])
