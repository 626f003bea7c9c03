"""Video codecs: a tile is an intra picture."""
