"""What makes a matrix low-rank on data: statistics of a layer's inputs, ranks, one eigenproblem."""
