"""Questions about a model and a method that change neither."""
