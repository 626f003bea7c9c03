"""Image codecs: a tile is a gray picture."""
