"""Moving an adapter to another base without its data (Trans-LoRA): synthetic inputs, a filter, a bundle, labels."""
