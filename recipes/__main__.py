"""python -m recipes [NAME …] [--seeds … --steps …]: run recipes one after the other, by default all of them.

python -m recipes --page recipes/README.md: put the verdicts that are on record between the page's marks.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

from addenda import AddendaError
from recipes.kept import put_table

NAMES = ("svft", "loldu", "miss", "lora_pro", "dylora", "shira", "one_bit", "mosa", "lord", "trp")


def main() -> None:
    named, rest = [a for a in sys.argv[1:] if a in NAMES], [a for a in sys.argv[1:] if a not in NAMES]
    if "-h" in rest or "--help" in rest:
        told = (f"  {name:9} {(import_module(f'recipes.{name}').__doc__ or '').splitlines()[0]}" for name in NAMES)
        print(__doc__, *told, sep="\n")
    elif rest[:1] == ["--page"]:
        if len(rest) != 2:
            raise AddendaError("--page is followed by one file: python -m recipes --page recipes/README.md")
        _page(Path(rest[1]))
    else:
        for name in named or NAMES:
            sys.argv = [f"recipes.{name}", *rest]
            import_module(f"recipes.{name}").main()


def _page(page: Path) -> None:
    lines = ["| paper | claim | measured | verdict |", "| --- | --- | --- | --- |"]
    files = [Path(f"records/recipes/{name}/verdict.json") for name in NAMES]
    for file in (f for f in files if f.exists()):
        kept = json.loads(file.read_text(encoding="utf-8"))
        for finding in kept["findings"]:
            cells = [kept["paper"], finding["claim"], finding["measured"], f"**{finding['verdict']}**"]
            lines.append(f"| {' | '.join(cells)} |")
    put_table(page, lines)


if __name__ == "__main__":
    try:
        main()
    except AddendaError as error:
        sys.exit(f"addenda: {error}")
