"""Several adapters of one base: combined into one, kept in a bank of files, and what each task keeps of its score."""
