"""What a model remembers of its adapters."""
