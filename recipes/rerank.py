"""Rerankers in many languages: sparse changes, bottlenecks and whole models, with and without a language's part.

python -m recipes rerank --cost              time ten steps of each arm, and say what all runs take
python -m recipes rerank --within 90m        run, in a sitting of so long; the same command goes on, killed or not
python -m recipes rerank --page FILE         put what is on record between a page's marks (<!-- rerank -->)
python -m recipes rerank                     run all that is missing; --all: monolingual pairs, widths, places too
    --root FOLDER                            where records are (records/rerank)

The task is learned in English, on Debian's package descriptions, and judged in other languages: English queries, the
other language's documents, of source packages that nothing was learned from. What each arm is: recipes/rerank_arms.py;
what is claimed: recipes/rerank_claims.toml. A record holds values by query (a hash stands for it), seeds, seconds and
bytes; adapters stay in the cache folder. The first stage is e5 as a bi-encoder, over all documents of the pool; each
arm puts its best documents in order, and those below keep theirs.

--within leaves out languages, then queries, and names them; never seeds. What was left out is run by a later call.
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

from addenda.core.file.identity import base_of, versions
from addenda.models.load import load_model
from recipes.kept import Runs, known_in, put_table
from recipes.rerank_arms import Bench
from recipes.rerank_claims import read_claims
from recipes.rerank_cost import Plan, Speeds, Unit, cost_lines, plan, timed, units
from recipes.rerank_setting import Setting
from recipes.rerank_table import table
from recipes.seconds import seconds_of
from recipes.store import Clock, TimeUp

ROOT = Path("records/rerank")
GROWS = ("queries", "seeds", "languages", "arms")  # of a setting: no part of what one run is


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes rerank", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--within", help="such as 90m or 2.5h")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--all", action="store_true", dest="more")
    parser.add_argument("--root", type=Path, default=ROOT)
    given = parser.parse_args(arguments)
    within = None if given.within is None else seconds_of(given.within)
    margin, claims = read_claims()
    setting = Setting()
    if given.page:
        return put_table(given.page, table(margin, claims, known_in(given.root), setting), "rerank")
    bench = Bench(setting)
    left = [u for u in units(setting, setting.languages, given.more) if not done(given.root, u, setting.queries)]
    speeds = timed(bench, left)
    for line in cost_lines(left, speeds, setting):
        print(line)
    if given.cost and within is None:
        return
    found = chosen(given.root, setting, speeds, within, given.more)
    for line in found.said:
        print(line)
    if given.cost:
        return
    if not run(bench, given.root, found, speeds, Clock(None if within is None else within / 3600), given.more):
        print("The time is up. The same command goes on.", file=sys.stderr)
    print("\n".join(table(margin, claims, known_in(given.root), setting)))


def chosen(root: Path, setting: Setting, speeds: Speeds, within: float | None, more: bool = False) -> Plan:
    """Return what a sitting is about, given what is on record."""
    return plan(setting, speeds, within, lambda unit, queries: done(root, unit, queries), more)


def run(bench: Bench, root: Path, what: Plan, speeds: Speeds | None, clock: Clock, more: bool = False) -> bool:
    """Run what is missing of a plan, and return whether all of it is there. Killed, the next call goes on.

    Raises AddendaError where the records there are of another base, setting or versions, and where another process is
    at them.
    """
    setting = bench.setting = replace(bench.setting, queries=what.queries)
    told = {k: v for k, v in asdict(setting).items() if k not in GROWS}
    identity = {"base": base_of(load_model(bench.model, task="label", labels=1).model), "setting": told}
    bench.tick = lambda: clock.spare(0)
    given = argparse.Namespace(out=root, old=False)
    with Runs(given, identity | {"versions": versions()}) as runs:
        try:
            for unit in units(setting, what.languages, more):
                if done(root, unit, what.queries) and _there(bench, unit, what, root, more):
                    continue
                clock.spare(0)
                runs.once(unit.name, lambda unit=unit: unit.run(bench), again=True)
        except TimeUp:
            return False
    return True


def done(root: Path, unit: Unit, queries: int) -> bool:
    """Whether a run is on record, with so many queries where the pool has as many."""
    found = known_in(root)(unit.name)
    if found is None or "queries" not in found:
        return found is not None
    return len(found["queries"]) >= min(queries, found.get("asked", queries))


def _there(bench: Bench, unit: Unit, what: Plan, root: Path, more: bool) -> bool:
    """Whether the file of a run is still in the cache, if runs that are missing need it; else it is made again."""
    if unit.what not in ("part", "task"):
        return True
    file = bench.part_at(unit.arm, unit.language) if unit.what == "part" else bench.file(unit.arm, unit.seed, unit.rank)
    if file.exists():
        return True
    return all(done(root, u, what.queries) for u in units(bench.setting, what.languages, more))


if __name__ == "__main__":
    main()
