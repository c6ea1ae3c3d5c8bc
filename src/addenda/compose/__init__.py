"""Several adapters acting at once: stacked, averaged, split, side by side, or fused."""
