"""Debian's package lists and translated descriptions, fetched by `apt-get` into a folder of our own.

`apt-get update` is run with every place that it writes to in that folder, no hooks of the system's, and the languages
asked for; it needs no root, and neither the system's lists nor its locks are touched. Servers and keys are those that
the system knows, and apt checks the signatures. The texts are fetched when they are wanted and are never part of this
package: what their licences allow has not been looked into.

A folder counts only with `lists.json`, which names each file by its size and is written before the folder gets its
name: a fetch that was killed or that failed leaves nothing that could be taken for lists.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.disk.access import shown, writing
from addenda.core.disk.cache import cache_folder
from addenda.core.disk.unfinished import unfinished
from addenda.core.disk.whole import flush

RECORD = "lists.json"
FORMAT = 1
SECONDS = 600.0  # after which apt-get is given up
LISTS = re.compile(
    r"(?P<part>.+_dists_(?P<suite>[^_]+)_(?P<component>[^_]+))_(binary-[^_]+_Packages|i18n_Translation-"
    r"(?P<language>[\w%@-]+))(?P<packed>\.(?:lz4|gz|xz|bz2))?"
)
_CODE = re.compile(r"[a-z]{2,3}(_[A-Z]{2})?(@\w+)?")
_CONFIGURATION = """#clear Acquire::Languages;
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Acquire::Languages {{ {languages} }};
Acquire::IndexTargets::deb-src::Sources::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
Acquire::Retries "2";
APT::Sandbox::User "root";
Dir::State "{place}";
Dir::State::lists "{place}/lists";
Dir::State::status "{place}/status";
Dir::Cache "{place}/cache";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Dir::Log "{place}/log";
"""


def lists_folder() -> Path:
    """Return where the lists are kept, fetched or not."""
    return cache_folder() / "debian"


def fetch(languages: Iterable[str], *, again: bool = False, progress: Callable[[str], None] | None = None) -> Path:
    """Return the folder with the lists and the descriptions in these languages and English, fetched where they lack.

    again: fetch what is newest, though all is there. progress: called with one sentence before the fetch.
    Raises AddendaError, and leaves nothing new, without apt-get, without a network, and for a language that there is
    not.
    """
    wanted = {"en", *languages}
    if bad := [code for code in sorted(wanted) if not _CODE.fullmatch(code)]:
        raise AddendaError(
            f"A language is a code such as de or pt_BR, got {bad[0]!r}.{nearest(bad[0], wanted - {*bad})}"
        )
    folder = lists_folder()
    fetched = fetched_languages(folder)
    if wanted <= fetched and not again:
        return folder
    _check_own(folder)
    if shutil.which("apt-get") is None:
        raise AddendaError(
            "Debian's package descriptions are fetched by apt-get, which is not on this machine. Run this on Debian or "
            "Ubuntu, or name a BEIR folder of your own with --data."
        )
    wanted |= fetched
    (progress or (lambda _: None))(
        f"Fetching Debian's descriptions in {', '.join(sorted(wanted))} into {folder} (15 MB and up to 5 a language)."
    )
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(folder, folder=True) as parts:
            lists = _update(parts, sorted(wanted))
            made = parts / "new"
            made.mkdir()
            for path in lists:
                path.rename(made / path.name)
            record = {
                "by": "addenda",
                "format": FORMAT,
                "languages": sorted(wanted),
                "offered": sorted(_offered(parts / "lists")),
                "files": {p.name: p.stat().st_size for p in sorted(made.iterdir())},
            }
            flush(made)
            (made / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
            flush(made)
            _check_own(folder)
            if folder.exists():
                folder.rename(parts / "earlier")
            made.rename(folder)
    return folder


def fetched_languages(folder: Path) -> set[str]:
    """Return the languages of a folder of lists that is whole, none of any other."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in record["files"]}
        if record["by"] != "addenda" or record["format"] != FORMAT or record["files"] != sizes:
            return set()
        return {str(code) for code in record["languages"]}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return set()


def offered_languages(folder: Path) -> list[str]:
    """Return the languages that the servers have, whether fetched or not; none of a folder that is not whole."""
    if not fetched_languages(folder):
        return []
    return [str(code) for code in json.loads((folder / RECORD).read_text(encoding="utf-8")).get("offered", ())]


def language_of(name: str) -> str | None:
    """Return the language of a file of translations by its name, None of any other file."""
    found = LISTS.fullmatch(name)
    code = found["language"] if found else None
    return re.sub("%5[fF]", "_", code) if code else None


def _check_own(folder: Path) -> None:
    """Raise AddendaError where what stands at the folder's place is not, or not only, of an earlier fetch."""
    if not folder.exists() and not folder.is_symlink():
        return
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        names = {*record["files"], RECORD}
        ours = not folder.is_symlink() and record["by"] == "addenda" and {p.name for p in folder.iterdir()} <= names
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        ours = False
    if not ours:
        raise AddendaError(
            f"Debian's lists are to be fetched into {shown(folder)}, which holds what addenda has not written, so "
            "it is not replaced. Move it away, or name another folder in the environment variable ADDENDA_CACHE."
        )


def _update(place: Path, languages: list[str]) -> list[Path]:
    """Run apt-get in an empty folder; return its files of lists. Raises AddendaError."""
    for name in ("lists/partial", "cache/archives/partial", "log"):
        (place / name).mkdir(parents=True)
    (place / "status").touch()
    quoted = " ".join(f'"{code}";' for code in languages)
    (place / "apt.conf").write_text(_CONFIGURATION.format(languages=quoted, place=place), encoding="utf-8")
    command = ["apt-get", "-c", str(place / "apt.conf"), "-q", "update"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=SECONDS, cwd=place,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise AddendaError(
            f"apt-get update had not ended after {SECONDS:.0f} seconds and was given up; nothing is kept. Look whether "
            "the network lets it through, and run the same command again."
        ) from None
    files = sorted(p for p in (place / "lists").iterdir() if LISTS.fullmatch(p.name))
    there = {language_of(p.name) for p in files}
    lines = [line for line in done.stderr.splitlines() if line.strip()][-3:]
    told = f" It says: {' '.join(lines)[:600]}" if lines else ""
    if done.returncode or None not in there or "en" not in there:
        raise AddendaError(
            f"apt-get update failed (exit code {done.returncode}), so there are no descriptions; nothing is kept. It "
            f"needs the network and a Debian or Ubuntu server among the system's sources.{told}"
        )
    if missing := [code for code in languages if code not in there]:
        known = sorted(_offered(place / "lists"))
        raise AddendaError(
            f"Debian has no descriptions in {', '.join(missing)}.{nearest(missing[0], known)} It has them in "
            f"{', '.join(known) or 'no language that its server tells of'}.{told if not known else ''}"
        )
    return files


def _offered(lists: Path) -> set[str]:
    """Return the languages that the servers' own tables of contents name."""
    found: set[str] = set()
    for path in lists.glob("*Release"):
        text = path.read_text(encoding="utf-8", errors="replace")
        found |= set(re.findall(r"^ \S+ +\d+ \S+/i18n/Translation-([\w@]+)(?:\.\w+)?$", text, re.MULTILINE))
    return found
