"""Which file of addenda imports which, read from the source: imports in functions and under TYPE_CHECKING count.

`python tests/layers.py` prints the floors, lowest first, and what each imports.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "addenda"

FLOORS = (
    "core.base",
    "core.modules",
    "core.disk",
    "core.method",
    "core.packed",
    "core.site",
    "core.forward",
    "core.state",
    "core.file",
    "core.merge",
    "core.adapter",
    "core.ask",
    "statistics",
    "methods",
    "optim",
    "compose",
    "reducing",
    "quantizing",
    "data",
    "models",
    "train",
    "comparing",
    "compressing",
    "exporting",
    "combining",
    "ranking",
    "transferring",
    "cli",
)
PLUG_INS = ("core.method.catalogue", "methods")  # the catalogue loads what it lists, in one lazy line


def files(root: Path = ROOT) -> dict[str, Path]:
    """Every file of the package by its dotted name under addenda; a package's own file by the package's name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path = ROOT) -> dict[str, set[str]]:
    """By file: the files that it imports."""
    known = files(root)
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for module in _named(node, known):
                if module in known and module != name:
                    found[name].add(module)
    return found


def _named(node: ast.AST, known: dict[str, Path]) -> list[str]:
    if isinstance(node, ast.Import):
        return [a.name.removeprefix("addenda.") for a in node.names if a.name.startswith("addenda")]
    if not isinstance(node, ast.ImportFrom) or node.level or (node.module or "").partition(".")[0] != "addenda":
        return []
    package = (node.module or "").removeprefix("addenda").removeprefix(".")
    inside = [f"{package}.{a.name}".removeprefix(".") for a in node.names]
    return [each if each in known else package for each in inside]


def floor(name: str) -> str:
    """The floor on which a file stands; "" for what is above all of them."""
    return next((f for f in FLOORS if name == f or name.startswith(f"{f}.")), "")


def upward(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Imports of a floor above: (file, what it imports)."""
    height = {f: i for i, f in enumerate((*FLOORS, ""))}
    return [
        (name, other)
        for name, others in graph.items()
        for other in sorted(others)
        if height[floor(other)] > height[floor(name)] and other not in ("", "core") and (name, other) != PLUG_INS
    ]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of files that import each other, directly or through others (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if (name, other) == PLUG_INS:
                continue
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            circle = [stack.pop()]
            while circle[-1] != name:
                circle.append(stack.pop())
            if len(circle) > 1:
                found.append(sorted(circle))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def packages(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """By floor: the floors that it imports."""
    found: dict[str, set[str]] = {f: set() for f in FLOORS}
    for name, others in graph.items():
        if floor(name):
            found[floor(name)] |= {floor(o) for o in others if (name, o) != PLUG_INS} - {"", floor(name)}
    return found


def table(root: Path = ROOT) -> str:
    """The floors, lowest first, with their number of files and what each imports."""
    graph, known = imports(root), files(root)
    below = packages(graph)
    lines = [f"{'floor':<14}{'files':>6}  imports"]
    for f in FLOORS:
        count = sum(1 for name in known if name.startswith(f"{f}."))
        lines.append(f"{f:<14}{count:>6}  {' '.join(b for b in FLOORS if b in below[f]) or '-'}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
