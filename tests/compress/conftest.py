"""The tiny models and the tokenizer of the training tests, and what the contract tests do to an adapter."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("train", "core")]
