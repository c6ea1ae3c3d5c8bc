"""How an adapted module computes."""
