"""Bit-exact floats: exponents entropy-coded, mantissas too where that gains."""

from torchcodec_weights.codecs.lossless.codec import Lossless

__all__ = ["Lossless"]
