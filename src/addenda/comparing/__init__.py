"""Comparing methods fairly: one model, one data set, one budget, several seeds, intervals."""
