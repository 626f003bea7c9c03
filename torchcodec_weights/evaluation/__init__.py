"""How good a compressed model is, and real models to try it on."""
