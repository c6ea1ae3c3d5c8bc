"""The forward of adapted modules: products with a change in them, changed activations, who acts where."""
