"""Ordering documents for a query: collections, groups of one query, losses, rerankers and their measures."""
