"""Ordering images by a sentence: the adapter's heads, against ridges, trained encoders, and what ignores the text.

python -m recipes order --cost              time a few steps of each arm, and say what all runs take
python -m recipes order --within 90m        run, in a sitting of so long; the same command goes on, killed or not
python -m recipes order --page FILE         put what is on record between a page's marks (<!-- order -->)
python -m recipes order                     run all that is missing
python -m recipes order --images FOLDER     write mosaics and tables to try `addenda order` with, and run nothing
    --processes 2                           of how many the plan is: start the command so often, one thread each
    --root FOLDER                           where records are (records/order)

Images are Fashion-MNIST mosaics, whose counts are known by construction (recipes/order_data.py), mosaics with tiles
made worse by grades, and defects of cloth. What each arm is: recipes/order_arms.py; what is claimed:
recipes/order_claims.toml. A record holds correlations by query, resamplings of their means, hashes and seconds.

--within leaves out whole arms at a size, the dearest and least needed first, and names them; never seeds.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from addenda import AddendaError
from addenda.core.file.identity import versions
from recipes.kept import SharedRuns, known_in, put_table
from recipes.order_arms import Bench
from recipes.order_claims import read_claims
from recipes.order_cost import Plan, Speeds, Unit, cost_lines, plan, timed, units
from recipes.order_data import tiles, write_images
from recipes.order_setting import Setting
from recipes.order_table import table
from recipes.seconds import seconds_of
from recipes.store import Busy, Clock, TimeUp

ROOT = Path("records/order")
GROWS = ("seeds",)  # of a setting: no part of what one run is


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes order", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--within", help="such as 90m or 2.5h")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--root", type=Path, default=ROOT)
    given = parser.parse_args(arguments)
    within = None if given.within is None else seconds_of(given.within)
    if given.processes < 1:
        raise AddendaError(f"--processes is {given.processes}, and a number of at least 1 is wanted.")
    margin, claims = read_claims()
    setting = Setting()
    if given.page:
        return put_table(given.page, table(margin, claims, known_in(given.root), setting), "order")
    if given.images:
        return write_images(given.images, tiles(), max(setting.images), setting.validation)
    torch.set_num_threads(1)
    bench = Bench(setting)
    cannot = cannot_run(bench)
    left = [u for u in units(setting) if not done(given.root, u) and not cannot(u)]
    speeds = timed(bench, left)
    for line in cost_lines(left, speeds, setting, given.processes):
        print(line)
    found = plan(setting, speeds, within, given.processes, lambda u: done(given.root, u), cannot)
    for line in found.said:
        print(line)
    if given.cost:
        return
    sys.stdout.flush()
    if not run(bench, given.root, found, speeds, Clock(None if within is None else within / 3600)):
        print("The time is up, or another process is at what is left. The same command goes on.", file=sys.stderr)
    print("\n".join(table(margin, claims, known_in(given.root), setting)))


def cannot_run(bench: Bench) -> Callable[[Unit], str]:
    """Return what says why a unit cannot be run: the textile images are the only data that may be missing."""
    try:
        bench.sources.wheel()
    except AddendaError as error:
        reason = str(error)
        return lambda unit: reason if unit.subject == "textile" else ""
    return lambda unit: ""


def run(bench: Bench, root: Path, what: Plan, speeds: Speeds | None, clock: Clock) -> bool:
    """Run what is missing of a plan, and return whether all of it is there. Killed, the next call goes on.

    Another process may do the same: each run is made by one of them. Raises AddendaError where the records there are of
    other encoders, another setting, other images or versions.
    """
    setting = bench.setting
    told = {k: v for k, v in asdict(setting).items() if k not in GROWS}
    images = replace(bench, setting=replace(setting, test=20), _held={}).part("mosaics", "test").digest
    identity = {"encoders": bench.towers.identity, "setting": told, "images": images, "versions": versions()}
    bench.tick = lambda: clock.spare(0)
    with SharedRuns(argparse.Namespace(out=root, old=False), identity) as runs:
        try:
            for unit in what.units:
                clock.spare(speeds.of(unit, setting) if speeds and not done(root, unit) else 0)
                try:
                    runs.once(unit.name, lambda unit=unit: unit.run(bench))
                except Busy:
                    continue
        except TimeUp:
            return False
    return all(done(root, unit) for unit in what.units)


def done(root: Path, unit: Unit) -> bool:
    """Return whether a run is on record."""
    return (root / "runs" / f"{unit.name}.json").exists()


if __name__ == "__main__":
    main()
