"""The stored format: the container and its tiles (docs/bitstream.md)."""
