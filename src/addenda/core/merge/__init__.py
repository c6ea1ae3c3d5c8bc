"""Writing a change into the base, with proof."""
