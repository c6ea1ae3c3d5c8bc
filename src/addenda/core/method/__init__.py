"""What a method is, the catalogue of them, and what families of methods share."""
