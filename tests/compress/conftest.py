"""The tiny models and the tokenizer of the training tests, and what the contract tests do to an adapter."""
