"""Speed and memory, side by side with the floor and with peers. `python -m bench --help`."""
