"""The name of the child module that keeps an adapted module's adapters, and whether a path is below one."""

CHILD = "addenda"


def is_ours(path: str) -> bool:
    """Return whether a module or a tensor at this path (or a child of this name) is an adapter's and not the base's."""
    return CHILD in path.split(".")
