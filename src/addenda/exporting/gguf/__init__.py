"""Adapters of llama.cpp: LoRA in GGUF files, written and read."""
