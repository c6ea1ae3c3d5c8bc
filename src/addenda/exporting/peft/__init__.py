"""Adapter folders of Hugging Face PEFT (0.21.2), read and written."""
