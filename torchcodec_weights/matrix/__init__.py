"""One matrix: its shape, its normalization, its container opened."""
