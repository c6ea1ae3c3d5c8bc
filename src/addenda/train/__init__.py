"""Training: data, loss, a trainer with strict checkpoints, and `tune`, which does it all."""
