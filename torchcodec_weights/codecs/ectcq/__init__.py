"""ECTCQ: entropy-coded trellis-coded quantization, a codec made for weights."""

from torchcodec_weights.codecs.ectcq.codec import ECTCQ

__all__ = ["ECTCQ"]
