"""Decoders of a matrix, and the choice among them (`choice`), which all callers go through."""
