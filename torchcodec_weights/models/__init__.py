"""Models: quantized, reported on, saved and loaded."""
