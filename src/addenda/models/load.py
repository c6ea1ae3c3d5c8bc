"""Models from folders: a transformers causal LM or classifier, of texts or images, with what reads its inputs.

Nothing is downloaded.
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.disk.access import path_of, read_json, reading
from addenda.core.file.header import IMPORTED, of_peft, read
from addenda.core.state.outside import drawn_at_random
from addenda.data.examples import TaskKind
from addenda.data.labels import named
from addenda.data.prepare import Preparation
from addenda.models.folder_check import check_size
from addenda.models.kinds import AUTO, KINDS, check_folder, task_in, task_of
from addenda.models.machine import DTYPES, pick_device, pick_dtype
from addenda.models.preparation import preparation_of
from addenda.models.pretrained import pretrained
from addenda.quantizing.bridges import adopt
from addenda.quantizing.quantize import FORMS, Form, bits_of
from addenda.quantizing.quantize import quantize as quantised

CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")
HEADS = ("score", "classifier", "classification_head", "cls_classifier", "distillation_classifier")


@dataclass(frozen=True)
class Loaded:
    """A model ready to be adapted. tokenizer: what reads its inputs, for images a `Preparation`.

    fresh: parameters without weights, drawn at random; note: the dtype, and why.
    """

    model: nn.Module
    tokenizer: Any
    source: str
    fresh: tuple[str, ...] = ()
    note: str = ""
    quantize: str | None = None  # the form of the linear layers' weights
    trust_remote_code: bool = False  # whether code of the folder was allowed to run

    @property
    def heads(self) -> tuple[str, ...]:
        """What must be trained besides the sites: modules with fresh weights, and the head of a classifier."""
        paths = [path.rpartition(".")[0] for path in self.fresh]
        if task_of(self.model) != "causal":
            paths += [name for name, _ in self.model.named_children() if name in HEADS]
        paths = list(dict.fromkeys(paths))
        return tuple(p for p in paths if not any(p.startswith(f"{q}.") for q in paths))

    def check_heads(self, also_train: tuple[str, ...]) -> None:
        """Raise AddendaError for fresh weights that nothing named in also_train would train."""
        frozen = [p for p in self.fresh if not any(f".{p}.".find(f".{t}.") >= 0 for t in also_train)]
        if frozen:
            raise AddendaError(
                f"{self.source} has no weights for {', '.join(frozen[:6])}; they were drawn at random and would "
                f"stay so. Train them: also_train={list(self.heads)!r} (or 'auto')."
            )


def load_model(
    path: str | Path,
    *,
    task: TaskKind | None = None,
    labels: int | None = None,
    image_size: int | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    seed: int = 0,
    quantize: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load the model of a folder, in evaluation mode, and its tokenizer or, for images, its `Preparation`.

    task: what to load it for; by default what its architecture says, and a classifier for a bare encoder or where
    labels are given. labels: the number of outputs of a new head. image_size: the side of the images in pixels, where
    not what the folder says. seed: of a new head's weights.
    quantize: a form that the linear layers' weights are kept in, see `quantizing.quantize`; layers that another library
    has quantised are read as they are. trust_remote_code: run code that the folder brings; never done unasked.
    Raises AddendaError when the folder, its configuration, its tokenizer or some of its weights are missing, for an
    architecture of another kind (see `supported`), and for an image size that the model cannot take.
    """
    if quantize is not None:
        Form.parse(quantize)  # a mistake here should not cost the time to read the model

    folder = Path(path).expanduser()
    config: Any = config_of(folder, trust_remote_code)
    task = task or task_in(config)
    if task == "causal" and labels is not None:
        task = "label"
    check_folder(config, task)
    if image_size is not None and task != "image":
        raise AddendaError(f"image_size is for models that read images; {folder} holds a {KINDS[task]}.")
    where = pick_device(device)
    compute_dtype, reason = pick_dtype(dtype, where)
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if labels is not None:
        if _own_head(config) and config.num_labels != labels:
            raise AddendaError(
                f"The classifier in {folder} has {config.num_labels} outputs ({_some(config.id2label.values())}), and "
                f"the data has {labels} labels. Give data with its labels, or labels= in its order."
            )
        config.num_labels = labels
    if task == "image" and getattr(config, "use_mask_token", False):
        config.use_mask_token = False  # for pretraining only; trained in full it would get no gradient
    torch.manual_seed(seed)
    try:
        check_size(config, AUTO[task], folder)
        flags: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = pretrained(AUTO[task], folder, config=config, dtype=compute_dtype, **flags, **trust)
        _check_shapes(info, folder)
        if task == "image":
            reader: Any = preparation_of(folder, config, image_size, **trust)
            _check_size(model, reader, folder)
        else:
            reader = pretrained("AutoTokenizer", folder, **trust)
    except AddendaError:
        raise
    except Exception as error:  # of whatever class: transformers reads what others wrote
        raise AddendaError(
            f"The folder {folder} could not be loaded as a {KINDS[task]}: {_first_line(error)} It holds: "
            f"{_some(p.name for p in sorted(folder.iterdir()))}. Get its files again where one is damaged or missing."
        ) from error
    fresh = tuple(sorted(info.get("missing_keys", ())))
    drawn_at_random(model, fresh)
    body = [p for p in fresh if task == "causal" or p.startswith(f"{model.base_model_prefix}.")]
    body = [p for p in body if ".pooler." not in p]
    if body:
        raise AddendaError(
            f"The folder {folder} lacks weights of its {type(model).__name__}: {_some(body)} ({len(body)} of "
            f"{len(model.state_dict())}). It was saved incompletely, or is another architecture."
        )
    if task == "label" and model.config.pad_token_id is None:  # a decoder finds the last token of a row by it
        ends = config.eos_token_id
        known = [reader.pad_token_id, *(ends if isinstance(ends, list | tuple) else [ends]), reader.eos_token_id]
        model.config.pad_token_id = next((t for t in known if t is not None), None)
    _check_finite(model, folder)
    note = f"{str(compute_dtype).removeprefix('torch.')} on {where.type} ({reason})"
    if not getattr(model, "is_quantized", False):  # else it is where its library put it
        model = model.to(where)
    adopt(model)
    if quantize is not None:
        errors = quantised(model, quantize)
        note += f"; {len(errors)} linear layers in {quantize}, {bits_of(model):.2f} bits a weight"
    return Loaded(model.eval(), reader, str(folder), fresh, note, quantize, trust_remote_code)


def _own_head(config) -> bool:
    return any(kind in name for name in config.architectures or () for kind in CLASSIFIERS)


def _check_size(model: nn.Module, how: Preparation, folder: Path) -> None:
    """Raise AddendaError where a model that must be asked to stretch its position embeddings gets another size."""
    size = getattr(model.config, "image_size", None)
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    fixed = "interpolate_pos_encoding" in inspect.signature(type(model).forward).parameters
    if fixed and len(sides) == 2 and how.size not in (None, sides):
        raise AddendaError(
            f"The {type(model).__name__} in {folder} takes images of {sides[0]} × {sides[1]} pixels only, and they "
            f"would be {how}. Give image_size={sides[0]} (--image-size), or leave it out."
        )


def name_outputs(model: Any, names: Sequence[str]) -> None:
    """Write the names of a classifier's outputs into its configuration, which is saved with it."""
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {n: i for i, n in enumerate(names)}


def head_in(folder: str | Path, trust_remote_code: bool = False) -> tuple[tuple[str, ...] | None, int | None]:
    """Return (names of a kept head's outputs, how many it has); None for what is not known, or a new head."""
    config: Any = config_of(Path(folder).expanduser(), trust_remote_code)
    return (named(config), config.num_labels) if _own_head(config) else (None, None)


def config_of(folder: Path, trust_remote_code: bool = False):
    """Read a folder's configuration. Raises AddendaError where there is none."""
    with reading(folder):
        has_config = (folder / "config.json").is_file()
    if not has_config and of_peft(folder):
        raise AddendaError(f"{folder} is an adapter of PEFT and not a model, {IMPORTED}")
    if not has_config:
        siblings = folder.parent.iterdir() if folder.parent.is_dir() else ()
        names = [p.name for p in siblings if p != folder and (p / "config.json").is_file()]
        finding = "no config.json in it" if folder.is_dir() else "a file" if folder.is_file() else "no such folder"
        raise AddendaError(
            f"Expected the folder of a transformers model at {folder}, but there is {finding}."
            f"{nearest(folder.name, names)} Models are read from disk only: give a folder written by save_pretrained, "
            "or a loaded model."
        )
    try:
        return pretrained("AutoConfig", folder, trust_remote_code=trust_remote_code)
    except AddendaError:
        raise
    except Exception as error:  # of whatever class: transformers reads what others wrote
        raise AddendaError(
            f"transformers cannot read {folder / 'config.json'}: {_first_line(error)} Mend the file, or get it again."
        ) from None


def _check_shapes(info: dict, folder: Path) -> None:
    """Raise AddendaError for weights of other shapes than config.json says: they would be drawn at random."""
    lines = [
        f"{key}: {list(file_shape)} in the file, {list(config_shape)} wanted"
        for key, file_shape, config_shape in info.get("mismatched_keys", ())
    ]
    if lines:
        raise AddendaError(
            f"{len(lines)} weights in {folder} have other shapes than its config.json says: {'; '.join(lines[:4])}. "
            "Weights and config.json do not belong together; get both from one source."
        )


def _check_finite(model: nn.Module, folder: Path) -> None:
    """Raise AddendaError for a base that is not finite: it has no loss, whatever rate it is trained at."""
    for name, p in model.named_parameters():
        if (
            not p.is_floating_point()
            or p.is_meta
            or p.element_size() < 2
            or torch.isfinite(p.detach().sum(dtype=torch.float32))
        ):
            continue
        count = int((~torch.isfinite(p.detach())).sum())
        if count:
            raise AddendaError(
                f"The base itself is not finite: {name} in {folder} has {count:,} of {p.numel():,} numbers that are "
                "NaN or infinite. Its file is damaged, or was saved from a run that failed; get it again."
            )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].strip()[:300]}".rstrip(" .:") + "."


def _some(names, n: int = 8) -> str:
    names = [str(x) for x in names]
    return ", ".join(names[:n]) + (f" … and {len(names) - n} more" if len(names) > n else "") or "nothing"


def wanted_by(adapter: str | Path | None) -> dict:
    """Return the options to load the base of an adapter file with: outputs, image size, form of the weights."""
    if adapter is None:
        return {}
    header, _ = read(adapter)
    heads = [s for s in header.heads if s.path.split(".")[0] in HEADS]
    shapes = [s.shape for s in heads if len(s.shape) == 2]
    options: dict[str, Any] = {"labels": shapes[-1][0]} if shapes else {}
    if header.labels and options.get("labels", len(header.labels)) != len(header.labels):
        raise AddendaError(
            f"{adapter} names {len(header.labels)} labels, and the head in it has {options['labels']} outputs."
        )
    forms = {s.form for s in header.sites if s.form is not None}
    if len(forms) == 1 and (form := forms.pop()) in FORMS:
        options["quantize"] = form
    run = _run_beside(adapter).get("options", {})
    side, form = run.get("image_size"), run.get("quantize")
    if type(side) is int and 0 < side <= 8192:
        options["image_size"] = side
    return options | ({"quantize": form} if isinstance(form, str) else {})


def dtype_for(adapters: Iterable[str | Path], dtype: str) -> str:
    """Return the dtype to load the base of adapter files in: for "auto" that of training, where all have the same."""
    if dtype != "auto":
        return dtype
    found = {s.dtype for adapter in adapters for s in read(adapter)[0].sites if s.hash is not None}
    return found.pop() if len(found) == 1 and found <= set(DTYPES) else dtype


def labels_beside(adapter: str | Path | None) -> list[str] | None:
    """Return the names of the classes in an adapter file, by output; else those in the run.json beside it."""
    if adapter is None:
        return None
    names = list(read(adapter)[0].labels) or _run_beside(adapter).get("data", {}).get("labels")
    usable = isinstance(names, list) and 0 < len(names) < 100_000 and all(isinstance(n, str) for n in names)
    return names if usable else None


def _run_beside(adapter: str | Path | None) -> dict:
    """Read the run.json beside an adapter file, objects only; empty where there is none, or it is another's."""
    if adapter is None or not (file := path_of(adapter).with_name("run.json")).is_file():
        return {}
    try:
        run = read_json(file)
    except AddendaError:
        return {}
    return {k: v for k, v in run.items() if isinstance(v, dict)} if isinstance(run, dict) else {}
