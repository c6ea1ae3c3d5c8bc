"""Do papers' claims show on a small model? Claims first (recipes/claims.toml), then runs, then verdicts.

python -m recipes --cost                 what every paper will take, the cheapest first; nothing is trained for long
python -m recipes run [PAPER …]          claims until they are decided: small subjects, then three fairer ones
    --hours 2.5                          for so long; the same command goes on where it stopped, killed or not
    --subject NAME …                     these subjects only; --cost knows it too
    --root FOLDER                        where records are (records/recipes2)
python -m recipes --page FILE            put the verdicts that are on record between a page's marks
python -m recipes lord --latency         LoRD's own table, and times: on a quiet machine
python -m recipes rerank --within 90m    rerankers in many languages: its own claims, runs and table
python -m recipes trans-lora --toy       an adapter on another base without its data: its own, too
python -m recipes order --within 90m     ordering images by a sentence: the same

Started twice, two processes share the work, one thread each.
"""

import argparse
import sys
from pathlib import Path

from addenda import AddendaError
from recipes import lord
from recipes.claims import RECIPES, read_claims
from recipes.costs import priced
from recipes.kept import put_table
from recipes.page import table
from recipes.store import Clock
from recipes.subjects import SETTINGS
from recipes.work import order, run

ROOT = Path("records/recipes2")


def main() -> None:
    if sys.argv[1:2] == ["lord"]:
        sys.argv = sys.argv[1:]
        return lord.main()
    if sys.argv[1:2] == ["rerank"]:
        sys.argv = sys.argv[1:]
        from recipes import rerank

        return rerank.main()
    if sys.argv[1:2] == ["trans-lora"]:
        sys.argv = sys.argv[1:]
        from recipes import trans_lora

        return trans_lora.main()
    if sys.argv[1:2] == ["order"]:
        sys.argv = sys.argv[1:]
        from recipes import order as ordering

        return ordering.main()
    parser = argparse.ArgumentParser(
        prog="python -m recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", help=f"run, and papers: {', '.join(RECIPES)}")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--hours", type=float)
    parser.add_argument("--subject", nargs="+", default=[], choices=[*SETTINGS, "two-tasks", "trp", "lord"])
    parser.add_argument("--root", type=Path, default=ROOT)
    given = parser.parse_args()
    claims = read_claims()
    if given.hours is not None and not given.hours > 0:
        raise AddendaError(f"--hours is {given.hours:g}, and a number above 0 is wanted.")
    if given.cost:
        for price in priced(claims, given.root, given.subject):
            print(price.words())
    elif given.page:
        put_table(given.page, table(claims, given.root))
    elif given.what[:1] == ["run"]:
        if unknown := [name for name in given.what[1:] if name not in RECIPES]:
            raise AddendaError(f"There is no recipe {unknown[0]!r}. There are {', '.join(RECIPES)}.")
        papers = [p for p in order(claims, given.subject) if not given.what[1:] or _recipe(claims, p) in given.what[1:]]
        if not run(claims, papers, given.root, Clock(given.hours)):
            print("The time is up. The same command goes on.", file=sys.stderr)
    else:
        parser.print_help()


def _recipe(claims, paper: str) -> str:
    return claims.of(paper)[0].recipe


if __name__ == "__main__":
    try:
        main()
    except AddendaError as error:
        sys.exit(f"addenda: {error}")
