"""The command line: thin. Parse, call, print. Nothing heavy is imported before a command runs."""
