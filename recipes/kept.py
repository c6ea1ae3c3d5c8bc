"""A recipe's folder: whose it is, what its runs are of, and one run at a time in it.

A folder that was begun keeps an identity (see `addenda.core.file.identity`), in a comparison's config.json or, of
further runs, in identity.json; only the same recipe, on the same base, data, options and versions, goes on with it,
with more seeds where they are asked for. A folder without one was left by a version that kept none: it is read and
concluded from, and nothing is run for it or written to it.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from addenda import AddendaError
from addenda.core.disk.access import file_of, read_json
from addenda.core.disk.atomic import readable, write_atomically
from addenda.core.disk.lock import alone
from addenda.core.disk.place import check_free, folder_for
from addenda.core.file.identity import goes_on, larger, look, plain
from recipes.store import Busy, lock_of

_UNSET = object()
_OLD = "was left by a version that did not keep which base, data and options its runs have, so that it is only read"


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line of a recipe; `old` says whether its folder is one that is only read.

    Raises AddendaError for a folder that is not a recipe's, and for an old one together with any other option.
    """
    given = parser.parse_args()
    unset = argparse.Namespace(**dict.fromkeys(vars(given), _UNSET))
    named = {k for k, v in vars(parser.parse_args(namespace=unset)).items() if v is not _UNSET}
    if numbers := [k for k, v in vars(given).items() if type(v) is int and v < 1]:
        raise AddendaError(f"--{numbers[0]} is {getattr(given, numbers[0])}, and a number of at least 1 is wanted.")
    given.out = folder_for(given.out, apart=[vars(given).get("model")])
    check_free(given.out, {"verdict.json": _is_verdict, "identity.json": _is_identity, "runs": _are_runs})
    given.old = is_old(given.out)
    if given.old and (other := sorted(named - {"out"})):
        raise AddendaError(
            f"{given.out} {_OLD}, without --{', --'.join(other)}. Give another --out to run with these options."
        )
    if given.old:
        print(f"{given.out} {_OLD}. --out with another folder starts anew.", file=sys.stderr)
    return given


def is_old(out: Path) -> bool:
    """Whether a folder holds runs or comparisons, and any of them without an identity."""
    configs = [c for c in (out / "config.json", *out.glob("*/draw*/config.json")) if c.exists()]
    runs = any((out / "runs").glob("*.json")) and not (out / "identity.json").exists()
    return runs or any(not isinstance(_object(c).get("identity"), dict) for c in configs)


def _object(file: Path) -> dict:
    try:
        value = read_json(file)
    except AddendaError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_verdict(file: Path) -> bool:
    return {"paper", "findings"} <= _object(file).keys()


def _is_identity(file: Path) -> bool:
    return isinstance(_object(file).get("identity"), dict)


def _are_runs(folder: Path) -> bool:
    known = _is_identity(folder.parent / "identity.json") or _is_verdict(folder.parent / "verdict.json")
    return folder.is_dir() and (known or not any(folder.iterdir()))


def known_in(root: Path) -> Callable[[str], dict | None]:
    """Return how a run of a folder is read by its name; None where there is none."""

    def known(name: str) -> dict | None:
        file = root / "runs" / f"{name}.json"
        return read_json(file) if file.exists() else None

    return known


class Runs:
    """Finished runs by name, one small JSON file each, for recipes that do more than compare arms.

    `with Runs(given, identity) as runs`: alone in the folder. identity: what decides
    the runs' numbers, `seeds` among it, of which there may be more later; it is not looked at in an old folder.
    """

    def __init__(self, given: argparse.Namespace, identity: dict):
        self.out, self.old = given.out, given.old
        self.folder, self.identity = given.out / "runs", plain(identity)
        self._held = ExitStack()

    def __enter__(self) -> "Runs":
        if self.old:
            return self
        self._held.enter_context(alone(self.out))
        try:
            self._begin()
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._held.close()

    def _begin(self) -> None:
        file = self.out / "identity.json"
        kept = {"identity": self.identity, "looks": []}
        if file.exists():
            kept = read_json(file)
            way = "Choose another --out, or repeat the first command to go on."
            grown = goes_on(f"{self.out}", kept["identity"], self.identity, grows={"seeds": larger}, way=way)
            if not grown:
                return
            made = look(grown, f"{len(list(self.folder.glob('*.json')))} runs")
            kept = {"identity": self.identity, "looks": [*kept.get("looks", []), made]}
        write_atomically(file, (readable(kept) + "\n").encode())

    def known(self, name: str) -> dict | None:
        """What is kept under this name."""
        return known_in(self.out)(name)

    def once(self, name: str, make: Callable[[], dict], enough: Callable[[dict], bool] = lambda kept: True) -> dict:
        """What is kept under this name, or what `make` returns, kept from now on. Raises AddendaError in an old one.

        enough: whether what is kept will do; else it is made again.
        """
        kept = self.known(name)
        if kept is not None and enough(kept):
            return kept
        if self.old:
            raise AddendaError(f"{self.out} {_OLD}, and it lacks the run {name}. Give another --out to run everything.")
        print(f"  {name}", file=sys.stderr, flush=True)
        made = make()
        write_atomically(self.folder / f"{name}.json", (readable(made) + "\n").encode())
        return json.loads(json.dumps(made))


class SharedRuns(Runs):
    """The same for several processes at once: each locks the run that it is at, and the folder only to begin."""

    def __enter__(self) -> "SharedRuns":
        lock = lock_of(self.out, "")
        while not lock.take():
            time.sleep(0.05)
        try:
            self._begin()
        finally:
            lock.release()
        return self

    def once(self, name: str, make: Callable[[], dict], enough: Callable[[dict], bool] = lambda kept: True) -> dict:
        """What is kept under this name, or what `make` returns. Raises Busy where another process is making it."""
        lock = lock_of(self.out, name)
        if not lock.take():
            raise Busy(name)
        try:
            return super().once(name, make, enough)
        finally:
            lock.release()


def put_table(page: Path, lines: list[str], mark: str = "verdicts") -> None:
    """Put lines between a page's marks. Raises AddendaError where it has none."""
    text = file_of(page).read_text(encoding="utf-8")
    head, begin, tail = text.partition(f"<!-- {mark} -->\n")
    if not begin or "<!-- end -->" not in tail:
        raise AddendaError(f"{page} has no <!-- {mark} --> and <!-- end -->, between which the table goes.")
    whole = f"{head}{begin}" + "\n".join(lines) + f"\n{tail[tail.index('<!-- end -->') :]}"
    write_atomically(page, whole.encode())
