"""What a run reads: its model and tokenizer, the data, and what it is judged by, each when the others can tell it how.

The data says what the task is where they can, the folder else; a kept head names the classes, or else the data does.
"""

from typing import Any

from torch import nn

from addenda.core.adapter.handle import fitting
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of
from addenda.data.columns import as_train, check_classes
from addenda.data.examples import Data, TaskKind
from addenda.data.labels import head_of, of_head
from addenda.data.prepare import Preparation
from addenda.data.read import read, splits_of, without_columns
from addenda.data.subsets import Subset
from addenda.models.kinds import task_in, task_of
from addenda.models.load import Loaded, config_of, head_in, load_model, name_outputs
from addenda.models.machine import device_of, pick_device, pick_dtype
from addenda.quantizing.bridges import adopt


def check_loaded(model: nn.Module, tokenizer, loading: dict) -> None:
    """Raise AddendaError for what a loaded model wants, and what it cannot be given any more."""
    if tokenizer is None:
        raise AddendaError(
            "A loaded model wants its tokenizer= (for images a Preparation, see addenda.data.prepare); a folder "
            "brings its own."
        )
    if "image_size" in loading:
        raise AddendaError("image_size is for folders; give tokenizer=preparation.sized(pixels) with a loaded model.")
    if "quantize" in loading:
        raise AddendaError("quantize is for folders; call addenda.quantize(model) on a loaded model.")
    where, own = device_of(model), next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if loading["device"] is not None and pick_device(loading["device"]).type != where.type:
        raise AddendaError(f"device= is for folders; this model lies on {where}. Move it before: model.to(device).")
    asked = None if loading["dtype"] == "auto" else pick_dtype(loading["dtype"])[0]
    if asked not in (None, own):
        raise AddendaError(f"dtype= is for folders; this model is in {own}. Convert it before: model.to({asked}).")


def read_inputs(
    model, data, eval_data, tokenizer, columns: dict, subset: str | None, loading: dict, labels: tuple[str, ...] = ()
) -> tuple[Loaded, Data, Data | None]:
    """Return the model, the training data and the data to judge by, read in the order of their dependence.

    labels: the classes of a head that has no names of its own, in order.
    """
    if isinstance(model, nn.Module):
        adopt(model)
        task = task_of(model)
        names, outputs = head_of(model)
        loaded = as_loaded(model, tokenizer)
    else:
        task = data_task(data) or task_in(config_of(path_of(model, "model"), loading["trust_remote_code"]))
        trusted = loading["trust_remote_code"]
        (names, outputs), loaded = head_in(model, trusted) if task != "causal" else (None, None), None
    own = names
    if labels and not names and task != "causal":
        names, outputs = labels, outputs or len(labels)
    if hasattr(data, "splits") and eval_data is None:
        eval_data = read(data, split="validation")
    options: dict[str, Any] = dict(columns)
    if task != "causal":
        options |= {"labels": of_head(columns.get("labels"), names), "outputs": outputs}
    train = read(data, task=task, **options)
    held = None
    if subset is not None:
        train, held = Subset.parse(subset).of(train)
    if eval_data is not None:
        train, held = held_out(train, eval_data, task, loading["seed"], options)
    check_classes(train)
    if loaded is None:
        outputs = (len(train.labels) if train.labels else 1) if task != "causal" else None
        loaded = load_model(str(model), task=task, labels=outputs, **loading)
        if train.labels and not own:
            name_outputs(loaded.model, train.labels)
    fitting(loaded.model, train.labels or ())
    if data_task(train) != task_of(loaded.model):
        raise AddendaError(
            f"{train.source} holds {train.form} examples, which a {type(loaded.model).__name__} cannot learn."
        )
    return loaded, train, held


def held_out(train: Data, eval_data: Any, task: TaskKind, seed: int, options: dict) -> tuple[Data, Data]:
    """Return what is learned from and what is judged by: a share of the data, else eval_data, read as the data was.

    Of eval_data that has parts it is the validation part, else the test part, else all. options: of `data.read`.
    """
    if isinstance(eval_data, float):
        return train.split(eval_data, seed)
    found = splits_of(eval_data, task)
    part = next((s for s in ("validation", "test") if s in found), "train")
    options = options | as_train(train)
    ready = isinstance(eval_data, Data) or hasattr(eval_data, "metric")
    return train, read(eval_data, task=task, split=part, **(without_columns(options) if ready else options))


def as_loaded(model: nn.Module, tokenizer: Any) -> Loaded:
    """Return a loaded module as `load_model` returns a folder's."""
    return Loaded(model, tokenizer, getattr(model, "name_or_path", "") or type(model).__name__)


def data_task(data: Any) -> TaskKind | None:
    """Return what the data alone says about the task: texts with labels, images: classifiers; None: unknown."""
    forms: dict[str, TaskKind] = {
        "pair": "causal",
        "chat": "causal",
        "label": "label",
        "text": "masked",
        "image": "image",
    }
    return forms[data.form] if isinstance(data, Data) else None


def context(model: nn.Module, tokenizer) -> int | None:
    """Return how many tokens fit: the tokenizer's or configuration's smaller number; None if none, or for images."""
    if isinstance(tokenizer, Preparation):
        return None
    config = getattr(model, "config", None)
    said = [getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None)]
    known = [n for n in said if isinstance(n, int) and 0 < n < 10**6]
    return min(known) if known else None
