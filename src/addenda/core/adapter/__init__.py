"""Putting adapters on a model, loading them, and taking them off."""
