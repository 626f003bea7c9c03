"""One matrix as it is stored."""
