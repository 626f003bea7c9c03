"""Encoding of a matrix at a given rate."""
