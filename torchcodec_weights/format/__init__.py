"""What a file holds: the container and its tiles (docs/bitstream.md)."""
