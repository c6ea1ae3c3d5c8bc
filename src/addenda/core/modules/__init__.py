"""What torch's modules and autograd want of whoever computes inside them; knows nothing of adapters."""
