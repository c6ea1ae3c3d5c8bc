"""Several adapters at once, in other ways than one after another."""
