"""Adapter files: what is in one, and how it is written, read and compared."""
