"""Readers of picture headers: sizes and depths, read without a decoder and before one runs.

Decoders allocate the size that a header announces and decode all pictures in a stream. A checksum
does not protect against a file made by an attacker. So these readers parse a stream to its end, and
refuse everything that our encoders do not write.
"""
