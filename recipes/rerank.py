"""Rerankers in many languages: sparse changes, bottlenecks and whole models, with and without a language's part.

python -m recipes rerank --cost              time ten steps of each arm, and say what all runs take
python -m recipes rerank --within 90m        run, in a sitting of so long; the same command goes on, killed or not
python -m recipes rerank --page FILE         put what is on record between a page's marks (<!-- rerank -->)
python -m recipes rerank                     run all that is missing; --all: monolingual pairs, widths, places too
    --processes 2                            of how many the plan is: start the command so often, one thread each
    --root FOLDER                            where records are (records/rerank)

The task is learned in English, on Debian's package descriptions, and judged in other languages: English queries, the
other language's documents, of source packages that nothing was learned from. What each arm is: recipes/rerank_arms.py;
what is claimed: recipes/rerank_claims.toml. A record holds values by query (a hash stands for it), seeds, seconds and
bytes; adapters stay in the cache folder, and one that is gone from there is made again if a run that is missing reads
it. The first stage is e5 as a bi-encoder, over all documents of the pool; each arm puts its best documents in order,
and those below keep theirs.

--within leaves out languages, then queries, and names them; never seeds. What was left out is run by a later call.
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from addenda import AddendaError
from addenda.core.file.identity import base_of, versions
from addenda.models.load import load_model
from recipes.kept import SharedRuns, known_in, put_table
from recipes.rerank_arms import Bench
from recipes.rerank_claims import read_claims
from recipes.rerank_cost import Plan, Speeds, Unit, cost_lines, plan, timed, units
from recipes.rerank_setting import Setting
from recipes.rerank_table import table
from recipes.seconds import seconds_of
from recipes.store import Busy, Clock, TimeUp, do_all, lost

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
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--root", type=Path, default=ROOT)
    given = parser.parse_args(arguments)
    within = None if given.within is None else seconds_of(given.within)
    if given.processes < 1:
        raise AddendaError(f"--processes is {given.processes}, and a number of at least 1 is wanted.")
    margin, claims = read_claims()
    setting = Setting()
    if given.page:
        return put_table(given.page, table(margin, claims, known_in(given.root), setting), "rerank")
    torch.set_num_threads(1)
    bench = Bench(setting)
    left = missing(given.root, bench, setting.queries, given.more)
    speeds = timed(bench, left)
    for line in cost_lines(left, speeds, setting, given.processes):
        print(line)
    if given.cost and within is None:
        return
    found = chosen(given.root, bench, speeds, within, given.more, given.processes)
    for line in found.said:
        print(line)
    if given.cost:
        return
    sys.stdout.flush()
    if not run(bench, given.root, found, speeds, Clock(None if within is None else within / 3600), given.more):
        print("The time is up. The same command goes on.", file=sys.stderr)
    print("\n".join(table(margin, claims, known_in(given.root), setting)))


def missing(root: Path, bench: Bench, queries: int, more: bool = False) -> list[Unit]:
    """Return the runs that are not on record, and those whose files they read and the cache has lost."""
    every = units(bench.setting, bench.setting.languages, more)
    left = [u for u in every if not done(root, u, queries)]
    again = lost(left, lambda u: u.needs, lambda u: u.file(bench).exists())
    return [u for u in every if u in again or not done(root, u, queries)]


def chosen(
    root: Path, bench: Bench, speeds: Speeds, within: float | None, more: bool = False, processes: int = 1
) -> Plan:
    """Return what a sitting is about, given what is on record and in the cache."""
    again = {u.name for u in missing(root, bench, bench.setting.queries, more) if u.what in ("part", "task")}
    return plan(
        bench.setting,
        speeds,
        within,
        lambda u, queries: u.name not in again and done(root, u, queries),
        more,
        processes,
    )


def run(bench: Bench, root: Path, what: Plan, speeds: Speeds | None, clock: Clock, more: bool = False) -> bool:
    """Run what is missing of a plan, and return whether all of it is there. Killed, the next call goes on.

    Another process may do the same: each run is made by one of them. Raises AddendaError where the records there are of
    another base, setting or versions.
    """
    setting = bench.setting = replace(bench.setting, queries=what.queries)
    told = {k: v for k, v in asdict(setting).items() if k not in GROWS}
    identity = {"base": base_of(load_model(bench.model, task="label", labels=1).model), "setting": told}
    bench.tick = lambda: clock.spare(0)
    with SharedRuns(argparse.Namespace(out=root, old=False), identity | {"versions": versions()}) as runs:
        try:
            do_all(units(setting, what.languages, more), lambda unit: _ran(unit, bench, runs, clock), clock)
        except TimeUp:
            return False
    return True


def _ran(unit: Unit, bench: Bench, runs: SharedRuns, clock: Clock) -> bool:
    """Do a run that is not on record, the files that it reads first; False where another process is at any of these."""
    if done(runs.out, unit, bench.setting.queries):
        return True
    try:
        for need in unit.needs:
            _have(need, bench, runs, clock)
        clock.spare(0)
        runs.once(unit.name, lambda: unit.run(bench), lambda kept: done(runs.out, unit, bench.setting.queries))
    except Busy:
        return False
    return True


def _have(need: Unit, bench: Bench, runs: SharedRuns, clock: Clock) -> None:
    """Make a part or a task whose file is not in the cache, and what it reads. Raises Busy."""
    if not need.file(bench).exists():
        for further in need.needs:
            _have(further, bench, runs, clock)
        clock.spare(0)
    runs.once(need.name, lambda: need.run(bench), lambda kept: need.file(bench).exists())


def done(root: Path, unit: Unit, queries: int) -> bool:
    """Whether a run is on record, with so many queries where the pool has as many."""
    found = known_in(root)(unit.name)
    if found is None or "queries" not in found:
        return found is not None
    return len(found["queries"]) >= min(queries, found.get("asked", queries))


if __name__ == "__main__":
    main()
