"""Bases in few bits: our own formats, and other libraries' layers."""
