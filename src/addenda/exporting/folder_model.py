"""The model of a folder as its files describe it: structure, names and shapes, without a weight in memory."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import read_json, shown
from addenda.core.site.site import site_at
from addenda.models.checkpoint_files import CheckpointFiles
from addenda.models.kinds import AUTO
from addenda.models.load import config_of, name_outputs
from addenda.models.named_weights import NamedWeights
from addenda.models.pretrained import pretrained
from addenda.models.skeleton import skeleton


@dataclass
class FolderModel:
    """A folder's weights under the names of a model's class, and what config.json must say for it to be that class."""

    folder: Path
    architecture: str
    weights: NamedWeights
    changes: dict[str, Any] = field(default_factory=dict)  # entries of config.json that differ from the folder's

    @property
    def model(self) -> nn.Module:
        """The skeleton."""
        return self.weights.model

    @property
    def config(self) -> Any:
        """The configuration of the skeleton."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that most numbers of the folder have."""
        counts: dict[torch.dtype, int] = {}
        for t in self.weights.files.tensors.values():
            if t.dtype.is_floating_point:
                counts[t.dtype] = counts.get(t.dtype, 0) + t.size // t.dtype.itemsize
        return max(counts, key=lambda d: counts[d], default=torch.float32)

    @classmethod
    def of(
        cls, folder: Path, paths: Iterable[str] = (), outputs: int | None = None, labels: tuple[str, ...] = ()
    ) -> "FolderModel":
        """Read a folder's structure: of the class that its config.json names, or of a classifier.

        paths: those of an adapter's sites. Where the folder's own class lacks some of them, and the classifier of the
        same architecture has them all, the model is that one, with so many outputs of these names.
        Raises AddendaError for a folder whose files are missing, damaged, pickled, quantised, or unlike its config.
        """
        config = config_of(folder)
        files = CheckpointFiles.of(folder)
        model, changes = skeleton(config), {}
        if not _has_all(model, paths):
            other = _classifier(folder, config, paths, outputs, labels)
            model, changes = other or (model, changes)
        return cls(folder, type(model).__name__, NamedWeights.of(files, model), changes)

    def check_complete(self, given: Iterable[str] = ()) -> None:
        """Raise AddendaError for weights that neither the folder has nor `given` names: they would be drawn."""
        known = set(given)
        missing = [n for n in self.weights.missing if not known.intersection(self.weights.names[n])]
        ignored = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()
        missing = [n for n in missing if not any(str(pattern).strip("^$") in n for pattern in ignored)]
        if missing:
            raise AddendaError(
                f"{shown(self.folder)} has no weights for {len(missing)} parameters of its {self.architecture}: "
                f"{', '.join(missing[:6])}. It was saved incompletely, or an adapter's head is trained in part."
            )


def _has_all(model: nn.Module, paths: Iterable[str]) -> bool:
    return all(_has(model, path) for path in paths)


def _has(model: nn.Module, path: str) -> bool:
    try:
        site_at(model, path)
    except AddendaError:
        owner, _, leaf = path.partition("@")[0].rpartition(".")
        try:
            return leaf in model.get_submodule(owner)._modules
        except AttributeError:
            return False
    return True


def _classifier(
    folder: Path, config: Any, paths: Iterable[str], outputs: int | None, labels: tuple[str, ...]
) -> tuple[nn.Module, dict[str, Any]] | None:
    """Return the skeleton of a classifier that has all paths, and what its config.json says; None where none has."""
    import transformers

    for auto in (AUTO["label"], AUTO["image"]):
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) not in mapping:
            continue
        own = deepcopy(config)
        if outputs is not None:
            own.num_labels = outputs
        if getattr(own, "use_mask_token", False):
            own.use_mask_token = False  # as `load_model`: for pretraining only
        name = mapping[type(config)].__name__
        model: Any = skeleton(own, name)
        if not _has_all(model, paths):
            continue
        if labels:
            name_outputs(model, labels)
        changes = {"architectures": [name], "id2label": own.id2label, "label2id": own.label2id}
        if auto == AUTO["label"] and own.pad_token_id is None:  # a decoder finds the last token of a row by it
            own.pad_token_id = changes["pad_token_id"] = _pad_of(folder, own)
        return model, changes
    return None


def _pad_of(folder: Path, config: Any) -> int | None:
    try:
        pad = pretrained("AutoTokenizer", folder).pad_token_id
    except Exception:  # of whatever class: transformers reads what others wrote
        pad = None
    return config.eos_token_id if pad is None else pad


def written_config(model: FolderModel, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return the folder's config.json with what a merge changes in it. dtype: the new one of all weights."""
    config: Mapping[str, Any] = read_json(model.folder / "config.json", foreign=True)
    changed = {**config, **model.changes}
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        keys = [k for k in ("dtype", "torch_dtype") if k in config] or ["dtype"]
        changed |= dict.fromkeys(keys, name)
        for key, part in changed.items():
            if isinstance(part, dict):
                inner = dict.fromkeys((k for k in ("dtype", "torch_dtype") if k in part), name)
                changed[key] = {**part, **inner}
    return changed
