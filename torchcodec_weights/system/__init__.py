"""Helpers without knowledge of weights: files, threads, terminals, settings."""
