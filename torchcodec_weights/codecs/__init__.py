"""Codecs: tiles of floats in, bitstreams out."""
