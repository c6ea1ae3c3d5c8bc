"""Where in a model a change can live, and how a user names such places."""
