"""Smaller models and smaller changes. Nothing heavy is imported here."""
