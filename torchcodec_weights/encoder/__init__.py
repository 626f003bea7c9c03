"""From a matrix to a bitstream of a wanted rate."""
