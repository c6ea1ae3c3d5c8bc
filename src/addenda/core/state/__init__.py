"""The state that a model keeps of its adapters."""
