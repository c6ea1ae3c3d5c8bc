"""Data as examples, and examples as what a model reads."""
