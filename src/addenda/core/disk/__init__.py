"""Files and folders: written whole or not at all, one process at a time, nothing of anybody else's touched."""
