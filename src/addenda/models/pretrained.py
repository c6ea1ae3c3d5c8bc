"""What transformers reads out of a folder on disk: the one place where its from_pretrained is called.

    config = pretrained("AutoConfig", folder)

A model's folder may bring code of its own (`auto_map` in its JSON files, an attention kernel of someone's repository).
It is run only where `trust_remote_code=True` says so; else transformers would ask on the terminal, and whatever is
piped into a command would be an answer. Nothing is downloaded.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from addenda.core.base.errors import AddendaError
from addenda.core.file.header import IMPORTED, PEFT
from addenda.models.folder_check import check_folder, check_tokens, entries_in

_OUTSIDE = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_UNREAD = frozenset(("pooler", "mask_token"))  # parts of an encoder that its states are none of


def pretrained(auto: str, folder: str | Path, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Call `transformers.<auto>.from_pretrained(folder, …)`, of local files only, without warnings and bars.

    auto: the name of a class of transformers. Weights are read from safetensors only, or from the GGUF file that
    gguf_file= names. Raises AddendaError where that takes code out of the folder and trust_remote_code is not given,
    for what no library should be given (see `models.folder_check`), and whatever transformers raises.
    """
    import transformers

    if "gguf_file" not in options:
        check_folder(Path(folder))
        if auto == "AutoTokenizer":
            check_tokens(Path(folder))
        if auto not in ("AutoConfig", "AutoTokenizer", "AutoImageProcessor"):
            options["use_safetensors"] = True

    if (Path(folder) / PEFT).is_file():  # transformers would put that adapter on the model without a word
        raise AddendaError(
            f"{folder} holds a model and an adapter of PEFT on it ({PEFT}), {IMPORTED} To take the model without the "
            f"adapter, move {PEFT} and the adapter's weights out of the folder."
        )
    if not trust_remote_code:
        _check_kernels(Path(folder))
    try:
        with quiet():
            return getattr(transformers, auto).from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code, **options
            )
    except (ValueError, ImportError, OSError) as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise AddendaError(_wants_code(Path(folder))) from error


def encoder_in(folder: str | Path) -> Any:
    """Return a folder's model without a head, in float32.

    A pooler or mask token that the folder lacks is zero: nothing asks an encoder's states for them, and numbers drawn
    at random would make it another model, by its fingerprint, at every load.

    Raises AddendaError for a folder that cannot be loaded so, or that lacks any other weight.
    """
    import torch

    with _reading(folder, "could not be loaded as an encoder"):
        model, info = pretrained("AutoModel", folder, dtype=torch.float32, output_loading_info=True)
    missing = sorted(info.get("missing_keys", ()))
    if body := [name for name in missing if not _UNREAD.intersection(name.split("."))]:
        raise AddendaError(
            f"The folder {folder} lacks weights of its {type(model).__name__}: {', '.join(body[:4])} ({len(body)} in "
            "all). They would be drawn at random; get its files again."
        )
    with torch.no_grad():
        for name in missing:
            model.get_parameter(name).zero_()
    return model


def tokenizer_in(folder: str | Path) -> Any:
    """Return the tokenizer of a folder. Raises AddendaError for one that cannot be read, or that knows no word."""
    with _reading(folder, "has no tokenizer that could be read"):
        found = pretrained("AutoTokenizer", folder)
        if len(found) <= len(found.all_special_tokens):  # as transformers makes of a folder that lacks its files
            raise ValueError("it knows no word")
    return found


@contextmanager
def _reading(folder: str | Path, failed: str) -> Iterator[None]:
    """Raise AddendaError for whatever goes wrong inside a `with` block. failed: what the folder did not do then."""
    try:
        yield
    except AddendaError:
        raise
    except Exception as error:  # of whatever class: transformers reads what others wrote
        raise AddendaError(
            f"The folder {folder} {failed} ({_first_line(error)}). Get its files again where one is damaged or missing."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")[:200]


def pretrained_as(cls: Any, folder: str | Path, **options: Any) -> Any:
    """Call `cls.from_pretrained(folder, …)` of a class that is there already: no code is read from the folder."""
    with quiet():
        return cls.from_pretrained(folder, local_files_only=True, **options)


def _wants_code(folder: Path) -> str:
    files = [file.name for file in sorted(folder.glob("*config.json")) if "auto_map" in entries_in(file)]
    code = sorted(file.name for file in folder.glob("*.py"))
    return (
        f"The folder {folder} can only be read by running code of its own ({', '.join(code) or 'of another repository'}"
        f", named in {' and '.join(files) or 'config.json'}), which is not done unasked: it could do anything. If you "
        "have read it and trust whoever wrote it, give --trust-remote-code (trust_remote_code=True); else take a model "
        "whose architecture transformers has itself."
    )


def _check_kernels(folder: Path) -> None:
    """Raise AddendaError for attention kernels of a repository: transformers would fetch that code without asking."""
    config = entries_in(folder / "config.json")
    kernels = [
        value for part in (config, *config.values()) if isinstance(part, dict) for value in map(part.get, _OUTSIDE)
    ]
    if names := [value for value in kernels if "/" in str(value)]:
        raise AddendaError(
            f"{folder / 'config.json'} asks for the kernel {names[0]!r}, which is code of another repository, and "
            "that is not run unasked. Take the entry out of it, or give --trust-remote-code (trust_remote_code=True)."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Turn transformers' warnings and bars off, for what is checked here anyhow."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
