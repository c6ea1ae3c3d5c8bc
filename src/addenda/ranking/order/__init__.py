"""Ordering images by a sentence: two frozen encoders, and an adapter that is trained to rank (arXiv 2412.06760)."""
