"""Models from folders: a transformers causal LM or sequence classifier with its tokenizer. Nothing is downloaded."""

import json
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from addenda.core.errors import AddendaError, nearest
from addenda.core.files import read
from addenda.train.evaluate import task_of
from addenda.train.machine import pick_device, pick_dtype

KINDS = {"causal": "causal LM", "label": "sequence classifier"}
HEADS = ("score", "classifier", "classification_head")


@dataclass(frozen=True)
class Loaded:
    """A model ready to be adapted. fresh: parameters without weights, drawn at random; note: the dtype, and why."""

    model: nn.Module
    tokenizer: object
    source: str
    fresh: tuple[str, ...] = ()
    note: str = ""

    @property
    def heads(self) -> tuple[str, ...]:
        """What must be trained besides the sites: modules with fresh weights, and the head of a classifier."""
        found = [path.rpartition(".")[0] for path in self.fresh]
        if task_of(self.model) == "label":
            found += [name for name, _ in self.model.named_children() if name in HEADS]
        found = list(dict.fromkeys(found))
        return tuple(p for p in found if not any(p.startswith(f"{q}.") for q in found))

    def check_heads(self, also_train: tuple[str, ...]) -> None:
        """Raises AddendaError for fresh weights that nothing named in also_train would train."""
        frozen = [p for p in self.fresh if not any(f".{p}.".find(f".{t}.") >= 0 for t in also_train)]
        if frozen:
            raise AddendaError(
                f"{self.source} has no weights for {', '.join(frozen[:6])}; they were drawn at random and would "
                f"stay so. Train them: also_train={list(self.heads)!r} (or 'auto')."
            )


def load_model(
    path: str | Path,
    *,
    task: Literal["causal", "label"] | None = None,
    labels: int | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    seed: int = 0,
) -> Loaded:
    """The model and tokenizer of a folder, in evaluation mode.

    task: what to load it for; by default what its architecture says, and a classifier for a bare encoder. labels: the
    number of outputs of a new head. seed: of a new head's weights.
    Raises AddendaError when the folder, its configuration, its tokenizer or some of its weights are missing.
    """
    import transformers

    folder = Path(path).expanduser()
    config: Any = config_of(folder)
    task = task or task_in(config)
    where = pick_device(device)
    kind, why = pick_dtype(dtype, where)
    auto: Any = (
        transformers.AutoModelForCausalLM if task == "causal" else transformers.AutoModelForSequenceClassification
    )
    own = any("ForSequenceClassification" in a for a in config.architectures or ())
    if labels is not None and task == "label":
        if own and config.num_labels != labels:
            raise AddendaError(
                f"The classifier in {folder} has {config.num_labels} outputs ({_some(config.id2label.values())}), and "
                f"the data has {labels} labels. Give data with its labels, or labels= in its order."
            )
        config.num_labels = labels
    torch.manual_seed(seed)
    try:
        with quiet():
            model, info = auto.from_pretrained(
                folder, config=config, dtype=kind, local_files_only=True, output_loading_info=True
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise AddendaError(
            f"The folder {folder} could not be loaded as a {KINDS[task]}: "
            f"{(str(error).strip() or type(error).__name__).splitlines()[0]} It holds: "
            f"{_some(p.name for p in sorted(folder.iterdir()))}."
        ) from error
    fresh = tuple(sorted(info.get("missing_keys", ())))
    body = [p for p in fresh if task == "causal" or p.startswith(f"{model.base_model_prefix}.")]
    body = [p for p in body if ".pooler." not in p]
    if body:
        raise AddendaError(
            f"The folder {folder} lacks weights of its {type(model).__name__}: {_some(body)} ({len(body)} of "
            f"{len(model.state_dict())}). It was saved incompletely, or is another architecture."
        )
    if task == "label" and model.config.pad_token_id is None:  # a decoder finds the last token of a row by it
        pad = tokenizer.pad_token_id
        model.config.pad_token_id = config.eos_token_id if pad is None else pad
    note = f"{str(kind).removeprefix('torch.')} on {where.type} ({why})"
    return Loaded(model.to(where).eval(), tokenizer, str(folder), fresh, note)


def task_in(config) -> Literal["causal", "label"]:
    """What an architecture is for; a bare encoder gets a classifier."""
    names = " ".join(config.architectures or ())
    return "causal" if "ForCausalLM" in names or "LMHeadModel" in names else "label"


def label_names(folder: str | Path) -> list[str] | None:
    """The names of a classifier's outputs in its own order, where they say more than LABEL_0."""
    config: Any = config_of(Path(folder).expanduser())
    own = any("ForSequenceClassification" in a for a in config.architectures or ())
    names = [config.id2label[i] for i in sorted(config.id2label)] if own and config.num_labels > 1 else []
    return names if names and not all(n.startswith("LABEL_") for n in names) else None


def config_of(folder: Path):
    """A folder's configuration. Raises AddendaError where there is none."""
    import transformers

    if not (folder / "config.json").is_file():
        around = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        what = "no config.json in it" if folder.is_dir() else "no such folder"
        raise AddendaError(
            f"Expected the folder of a transformers model at {folder}, but there is {what}."
            f"{nearest(folder.name, around)} Models are read from disk only: give a folder written by save_pretrained, "
            "or a loaded model."
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise AddendaError(f"transformers cannot read {folder / 'config.json'}: {error}") from None


def _some(names, n: int = 8) -> str:
    names = [str(x) for x in names]
    return ", ".join(names[:n]) + (f" … and {len(names) - n} more" if len(names) > n else "") or "nothing"


def wanted_by(adapter: str | Path | None) -> dict:
    """How the base of an adapter file is to be loaded: as a classifier of so many outputs if the file holds a head."""
    if adapter is None:
        return {}
    header, _ = read(adapter)
    heads = [s for s in header["sites"] if s["method"] == -1 and s["path"].split(".")[0] in HEADS]
    shapes = [s["shape"] for s in heads if len(s["shape"]) == 2]
    return {"task": "label", "labels": shapes[-1][0]} if shapes else {}


def labels_beside(adapter: str | Path | None) -> list[str] | None:
    """The names of the classes in the run.json beside an adapter file, where there is one."""
    try:
        run = json.loads(Path(adapter or "").with_name("run.json").read_text(encoding="utf-8"))
        return run["data"]["labels"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def quiet():
    """transformers' warnings and bars off, for what is checked here anyhow."""
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
