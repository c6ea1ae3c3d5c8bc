"""Helpers for code that computes inside torch's modules and autograd; they know nothing of adapters."""
