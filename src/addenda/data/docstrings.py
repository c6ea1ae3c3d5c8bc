"""A task of texts that every installation brings: which library is a docstring from?

    data = splits(docstrings(), "library")      # train, validation and test, as many of each of eight libraries
    data["test"].examples[0]                    # Labelled(text="Compute the eccentricity of …", label=1)

The texts are the first paragraphs of public docstrings, read where pip put them; the libraries' own names are blotted
out. All eight come with addenda, so nothing is fetched, and no text is kept in a record. Which texts they are depends
on the libraries' versions; a record names its examples by hash.
"""

import ast
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata, util
from pathlib import Path

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import reading, writing
from addenda.core.disk.atomic import write_atomically
from addenda.core.disk.cache import cache_folder
from addenda.data.examples import Data, Labelled

LIBRARIES = ("matplotlib", "networkx", "numpy", "pandas", "scipy", "sympy", "torch", "transformers")
OTHER_NAMES = ("np", "pd", "plt", "nx", "pytorch", "DataFrame", "Series", "Tensor")  # blotted out as well
KINDS = ("class", "function", "method")  # a second task on other docstrings: what does it describe?
SIZES = {"train": 4000, "validation": 400, "test": 1600}  # as many of every class

Row = tuple[str, str, str]  # first paragraph, library, kind


def docstrings(libraries: Iterable[str] = LIBRARIES, tell: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Return (first paragraph, library, kind) of every public docstring, in the order of the paragraph's SHA-256.

    A paragraph that occurs twice is left out, as are those of fewer than 5 or more than 40 words. Reading takes up to a
    minute, so that the result is kept in the cache folder, by the libraries' versions. tell: is called with a sentence
    before that. Raises AddendaError for a library that is not installed.
    """
    libraries = tuple(libraries)
    which = " ".join(f"{name} {_version(name)}" for name in libraries)
    kept = cache_folder() / f"docstrings-{hashlib.sha256(which.encode()).hexdigest()[:12]}.json"
    if (rows := _kept(kept)) is not None:
        return rows
    tell(f"Reading the docstrings of {which}, once.")
    found: dict[str, tuple[str, str] | None] = {}
    for library in libraries:
        spec = util.find_spec(library)
        for file in sorted(Path(str(spec and spec.origin)).parent.rglob("*.py")):
            if not {"tests", "testing", "_vendor"} & set(file.parts):
                with reading(file):
                    source = file.read_text(encoding="utf-8", errors="replace")
                for text, kind in _documented(source):
                    text = _blotted(text)
                    found[text] = None if text in found else (library, kind)
    rows = [(text, *about) for text, about in found.items() if about and 5 <= len(text.split()) <= 40]
    rows.sort(key=lambda row: _hash(row[0]))
    with writing(kept):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps(rows).encode())
    return rows


def splits(rows: list[Row], task: str = "library", sizes: Mapping[str, int] = SIZES) -> dict[str, Data]:
    """Return the splits that `sizes` names, equally many of every class. task "kind" takes what "library" leaves over.

    A class takes its first texts by hash, and a split is in the order of the hash: of a large library the hashes are
    small, so that a split's beginning holds more of it than its whole does. Judge whole splits.

    Raises AddendaError where a class has too few.
    """
    used, made = set(), {}
    for name, column, labels in (("library", 1, LIBRARIES), ("kind", 2, KINDS)):
        share = {k: n // len(labels) for k, n in sizes.items()}
        parts: dict[str, list[Labelled]] = {k: [] for k in sizes}
        for number, label in enumerate(labels):
            own = [row[0] for row in rows if row[column] == label and row[0] not in used][: sum(share.values())]
            if len(own) < sum(share.values()):
                raise AddendaError(f"There are {len(own)} docstrings of {label}, and {sum(share.values())} are wanted.")
            used.update(own)
            at = 0
            for part, n in share.items():
                parts[part] += [Labelled(text, number) for text in own[at : at + n]]
                at += n
        for examples in parts.values():
            examples.sort(key=lambda e: _hash(e.text))
        made[name] = {k: Data(tuple(v), "label", tuple(labels), "docstrings") for k, v in parts.items()}
        if name == task:
            break
    return made[task]


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        raise AddendaError(
            f"The docstrings of {library} are part of this task, and {library} is not installed. Run `pip install "
            f"{library}`, or name data of your own with --data."
        ) from None


def _kept(path: Path) -> list[Row] | None:
    """Return the rows of an earlier reading, or None where there are none whole."""
    try:
        return [(text, library, kind) for text, library, kind in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _documented(source: str) -> list[tuple[str, str]]:
    """Return (first paragraph of the docstring, kind) of every public class, function and method."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    found = []

    def walk(node: ast.AST, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                kind = "class" if isinstance(child, ast.ClassDef) else "method" if inside == "class" else "function"
                text = ast.get_docstring(child)
                if text and not child.name.startswith("_"):
                    found.append((" ".join(text.split("\n\n")[0].split()), kind))
                walk(child, kind)

    walk(tree, "module")
    return found


def _blotted(text: str) -> str:
    return re.sub(rf"(?i)\b({'|'.join((*LIBRARIES, *OTHER_NAMES))})\b", "…", text)
