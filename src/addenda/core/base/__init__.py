"""The ground floor: errors, numbers, random tensors, threads. Imports nothing of addenda but itself."""
