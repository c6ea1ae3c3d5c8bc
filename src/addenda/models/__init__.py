"""Models from folders and wheels, and the machine that they run on."""
