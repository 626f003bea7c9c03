"""Checkpoints larger than memory, encoded tensor by tensor, killed and resumed."""
