"""CodecWeightOnlyConfig: what to encode weights with, as torchao's `quantize_` takes it."""

import math
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
        settings = EncoderSettings(self.preset, self.profile, self.bit_depth, self.encoder_params)
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

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    return CodecWeightOnlyConfig(
        codec, bits, step, snr_db, preset, profile, bit_depth, dict(encoder_params or {})
    )


torch.serialization.add_safe_globals([CodecWeightOnlyConfig])
