"""One matrix: checks of its attributes, its normalization, its opened container."""
