"""One runnable file for each paper: its headline claim, tested small. See README.md beside this file."""
