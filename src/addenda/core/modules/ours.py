"""What in a model is an adapter's: a module that is changed keeps its adapters in one child of this name."""

CHILD = "addenda"


def is_ours(path: str) -> bool:
    """Return whether a module or a tensor at this path (or a child of this name) is an adapter's and not the base's."""
    return CHILD in path.split(".")
