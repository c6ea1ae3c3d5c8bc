"""What is in an adapter file, and how it is written."""
