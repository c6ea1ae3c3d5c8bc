"""The lowest versions that pyproject.toml admits, as constraints for pip: python tests/lowest.py [torch==2.13.0].

What is named on the command line stands in its own version instead.
"""

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def lowest(text: str, *instead: str) -> dict[str, str]:
    """Of every requirement in a pyproject.toml its name and the lowest version. Raises ValueError for one without."""
    project = tomllib.loads(text)["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    versions = {}
    for line in (*lines, *instead):
        if line.startswith(f"{project['name']}["):  # extras of its own
            continue
        bound = re.match(r"([\w.-]+)\s*(?:>=|==)\s*([\w.+]+)", line)
        if bound is None:
            raise ValueError(f"{line!r} in pyproject.toml has no lower bound. Give it the lowest that is tried.")
        versions[bound[1]] = bound[2]
    return versions


if __name__ == "__main__":
    bounds = lowest(PYPROJECT.read_text(), *sys.argv[1:])
    print(*(f"{name}=={version}" for name, version in bounds.items()), sep="\n")
