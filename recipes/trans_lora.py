"""Trans-LoRA: an adapter moves to another base without its data. Two tiny models, then SmolLM2 and half of it.

python -m recipes trans-lora --toy           20 seeds of two tiny models, 2 minutes each on a quiet core; goes on
python -m recipes trans-lora --cost          what the real part takes: its runs × the seconds they take here
python -m recipes trans-lora                 the real part, in a sitting of 60 minutes; the same command goes on
    --within 2h                              in a sitting of so long
    --processes 2                            of how many the plan is: start the command so often, one thread each
    --quick                                  one task, two seeds, five arms: no verdict
    --task NAME …                            these tasks only
    --root FOLDER                            where records are (records/trans-lora)
python -m recipes trans-lora --table         what is on record, and what it says of the claims
python -m recipes trans-lora --page FILE     put that between a page's marks (<!-- trans-lora -->)
python -m recipes trans-lora --power         how often the verdicts err, simulated
    --seeds N, --draws N                     of the toy; of the simulation

What is claimed stands in recipes/trans_lora_claims.toml since before the runs. The real part: the target is
SmolLM2-135M, the source its first 15 layers, healed on plain text (recipes/trans_lora_real.py says what each arm is). A
record holds accuracies, which items were right and seconds, never a text; what models have written stays in the cache
folder, and ten synthetic inputs are printed beside ten real ones when they are made. Started twice, two
processes share the seeds.
"""

import argparse
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from addenda import AddendaError
from addenda.core.disk.access import read_json
from addenda.core.disk.atomic import readable, write_atomically
from addenda.core.file.identity import goes_on, plain, versions
from recipes.kept import put_table
from recipes.seconds import seconds_of
from recipes.store import Clock, TimeUp, lock_of
from recipes.trans_lora_claims import SEEDS, Records, read_claims
from recipes.trans_lora_table import table

ROOT = Path("records/trans-lora")
FIRST = 100  # seed of the toy


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes trans-lora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag in ("toy", "cost", "quick", "table", "power"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--within", default=None)
    parser.add_argument("--task", nargs="+", default=None)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--root", type=Path, default=ROOT)
    given = parser.parse_args(arguments)
    for name in ("seeds", "draws", "processes"):
        if (value := getattr(given, name)) is not None and value < 1:
            raise AddendaError(f"--{name} is {value}, and a number of at least 1 is wanted.")
    if given.power:
        from recipes.trans_lora_power import lines

        return print("\n".join(lines(given.draws)))
    margin, claims = read_claims()
    if given.page or given.table:
        made = table(margin, claims, given.root)
        return put_table(given.page, made, "trans-lora") if given.page else print("\n".join(made))
    if given.toy:
        hours = None if given.within is None else seconds_of(given.within) / 3600
        if not toy(given.root / "toy", range(FIRST, FIRST + (given.seeds or SEEDS["toy"])), Clock(hours)):
            print("Not all seeds are there: the time is up, or another process is at them.", file=sys.stderr)
        return print("\n".join(table(margin, claims, given.root)))
    from recipes.trans_lora_sitting import sitting

    sitting(
        given.root, tasks=given.task, quick=given.quick, within=seconds_of(given.within or "60m"), only_cost=given.cost,
        seeds=given.seeds, processes=given.processes,
    )  # fmt: skip
    if not given.cost:
        print("\n".join(table(margin, claims, given.root)))


def toy(root: Path, seeds: Any, clock: Clock, setting: Any = None) -> bool:
    """Run the seeds of the toy that are missing, and return whether all are there.

    Raises AddendaError where the records there are of another setting or of other versions.
    """
    from recipes.trans_lora_toy import ToySetting, run

    setting = setting or ToySetting()
    identity = plain({"setting": asdict(setting), "versions": versions()})
    begin(root, identity)
    for seed in seeds:
        file = root / "runs" / f"seed-{seed}.json"
        lock = lock_of(root, f"seed-{seed}")
        if file.exists() or not lock.take():
            continue
        try:
            if file.exists():
                continue
            clock.spare(120)
            print(f"  seed {seed}", file=sys.stderr, flush=True)
            made = run(seed, setting, lambda: clock.spare(0))
            shown(made.pop("shown"))
            write_atomically(file, (readable(made) + "\n").encode())
        except TimeUp:
            return False
        finally:
            lock.release()
    return all((root / "runs" / f"seed-{s}.json").exists() for s in seeds)


def begin(root: Path, identity: dict[str, Any]) -> None:
    """Write down what a folder's runs are of, or compare it. Raises AddendaError for records of another setting."""
    file = root / "identity.json"
    if not file.exists():
        with suppress(FileExistsError):
            root.mkdir(parents=True)
        write_atomically(file, (readable({"identity": identity}) + "\n").encode())
        return
    goes_on(f"{root}", read_json(file)["identity"], identity, way="Choose another --root, or the versions of then.")


def shown(texts: dict[str, list[str]]) -> None:
    """Print synthetic inputs beside real ones, on stderr: texts of models are in no record."""
    for made, real in zip(texts["made"], texts["real"], strict=False):
        print(f"    {made[:60]:<60} | {real[:60]}", file=sys.stderr)


def records_in(root: Path) -> Records:
    """Return the records of a folder by seed."""
    files = sorted((root / "runs").glob("seed-*.json"), key=lambda f: int(f.stem.split("-")[1]))
    return {int(f.stem.split("-")[1]): read_json(f) for f in files}


if __name__ == "__main__":
    main()
