"""Adapters in another form than they were trained in."""
