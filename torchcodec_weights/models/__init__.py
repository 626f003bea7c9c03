"""Whole models: quantized, reported, saved, loaded."""
