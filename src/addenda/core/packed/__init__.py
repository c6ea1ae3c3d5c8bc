"""Weights and matrices that are kept in few bits."""
