"""Two checkpoints of one model, weight by weight: where they differ, and which sites hold that."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import shown
from addenda.core.site.kinds import CONV, CONV1D, LINEAR, PARAMETER, kind_of
from addenda.core.site.site import Owners, Site, owners_of, refusal, site_at
from addenda.core.site.targets import matching
from addenda.exporting.folder_model import FolderModel
from addenda.models.checkpoint_files import PIECE, CheckpointFiles
from addenda.models.load import HEADS
from addenda.models.named_weights import NamedWeights
from addenda.models.skeleton import skeleton


@dataclass(frozen=True)
class Changed:
    """One weight that differs. It is read each time that it is asked for, and nothing of it stays in memory."""

    name: str
    site: Site
    pair: "CheckpointPair"

    @property
    def base(self) -> Tensor | None:
        """The base's weight as stored, or None for a head of the tuned model alone."""
        weights = self.pair.base.weights
        return None if weights.holder(self.name) is None else weights.weight(self.name)

    @property
    def tuned(self) -> Tensor:
        """The tuned weight as stored."""
        return self.pair.tuned.weights.weight(self.name)

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield both weights' numbers in their order, vector by vector; each lies where the last one did."""
        return self.pair.pieces(self.name)


@dataclass
class CheckpointPair:
    """A base and a tuned checkpoint, whose weights have the same names and shapes but for heads that only one has."""

    base: FolderModel
    tuned: FolderModel

    @classmethod
    def of(cls, base: Path, tuned: Path) -> "CheckpointPair":
        """Match two folders. Raises AddendaError listing all in which they are not checkpoints of one model."""
        other, one = FolderModel.of(tuned), FolderModel.of(base)
        if one.architecture != other.architecture:
            one = _as(one, other)
        other.check_complete()
        problems = _unlike(one, other)
        if problems:
            raise AddendaError(
                f"{shown(base)} and {shown(tuned)} are no checkpoints of one model: {'; '.join(problems[:8])}"
                f"{f' … and {len(problems) - 8} more' if len(problems) > 8 else ''}."
            )
        return cls(one, other)

    @property
    def model(self) -> nn.Module:
        """The base's skeleton, on which sites are."""
        return self.base.model

    def changed(self) -> Iterator[Changed]:
        """Yield every weight that differs, in the model's order, once for all names that it has.

        Raises AddendaError where the tuned model has two weights in the place of the base's one, and where a weight
        that differs can be no site.
        """
        owners, linear = owners_of(self.model), set(_linear(self.model))
        for group in dict.fromkeys(self.base.weights.names.values()):
            only = self.base.weights.holder(group[0]) is None
            if not only and all(_equal(W, tuned) for W, tuned in self.pieces(group[0])):
                continue
            for name in group[1:]:
                if self.tuned.weights.names[name] != self.tuned.weights.names[group[0]] and not torch.equal(
                    self.tuned.weights.weight(name), self.tuned.weights.weight(group[0])
                ):
                    raise AddendaError(
                        f"{name} and {group[0]} are one weight in {shown(self.base.folder)} and two in "
                        f"{shown(self.tuned.folder)}. No adapter of a tied base holds both: save the base with "
                        "tie_word_embeddings=False and both weights, and extract from that."
                    )
            site = self._site(group[0], owners, linear)
            if reason := refusal(self.model, site, owners):
                raise AddendaError(f"{site.path} differs, and no adapter can hold that: {reason}.")
            yield Changed(group[0], site, self)

    def pieces(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the numbers of a weight that both have, in their order, vector by vector."""
        return zip(_pieces(self.base, name), _pieces(self.tuned, name), strict=True)

    def buffers(self) -> list[str]:
        """Return the names of buffers that differ, such as a batch norm's statistics: no adapter holds them."""
        names = [n for n, _ in self.model.named_buffers() if n in self.base.weights.unit_of]
        both = [n for n in names if n in self.tuned.weights.unit_of]
        return [n for n in both if not _equal(self.base.weights.weight_under(n), self.tuned.weights.weight_under(n))]

    def is_head(self, name: str) -> bool:
        """Return whether a weight is of a classifier's head, or of one that the base has not."""
        return self.base.weights.holder(name) is None or any(part in HEADS for part in name.split("."))

    def is_copied(self, name: str) -> bool:
        """Return whether a matrix becomes a whole copy: a head, or a convolution of each channel for itself."""
        if self.is_head(name):
            return True
        module: Any = self.model.get_submodule(name.rpartition(".")[0])
        return kind_of(module) == CONV and module.groups == module.out_channels > 1

    def _site(self, name: str, owners: Owners, linear: set[str]) -> Site:
        """Return the module that is called with a weight, where it is; else the weight itself."""
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and not self.is_copied(name) and len(self.base.weights.names[name]) == 1:
            try:
                site = site_at(self.model, path, owners)
            except AddendaError:
                return site_at(self.model, name, owners)
            called = site.kind not in (LINEAR, CONV1D) or path in linear
            if site.kind == PARAMETER or (called and refusal(self.model, site, owners) is None):
                return site
        return site_at(self.model, name, owners)


def _linear(model: nn.Module) -> list[str]:
    """Return the linear layers that are surely called: those of "linear", and the output layer."""
    output = _embeddings(model, "output")
    named = [path for path, module in model.named_modules() if module is output and output is not None]
    return [*matching(model, "linear"), *named]


def _embeddings(model: nn.Module, which: str) -> nn.Module | None:
    try:
        return getattr(model, f"get_{which}_embeddings", lambda: None)()
    except NotImplementedError:  # of models that read no tokens
        return None


def _as(one: FolderModel, other: FolderModel) -> FolderModel:
    """Return the base as the class of the tuned model. Raises AddendaError for another model."""
    if type(one.config) is not type(other.config):
        raise AddendaError(
            f"{shown(one.folder)} is a {one.architecture} and {shown(other.folder)} a {other.architecture}: no "
            "checkpoints of one model."
        )
    config = deepcopy(one.config)
    config.num_labels = other.config.num_labels
    model = skeleton(config, other.architecture)
    weights = NamedWeights.of(CheckpointFiles.of(one.folder), model)
    return FolderModel(one.folder, other.architecture, weights)


def _unlike(one: FolderModel, other: FolderModel) -> list[str]:
    """Return what is unlike in two models: names, shapes; more rows of an embedding are a grown vocabulary."""
    a, b = (dict(m.model.named_parameters(remove_duplicate=False)) for m in (one, other))
    problems = [f"only {side} has {name}" for side, x, y in (("the base", a, b), ("the tuned one", b, a))
                for name in x if name not in y]  # fmt: skip
    rows = getattr(_embeddings(one.model, "input"), "weight", torch.empty(0)).shape
    for name, p in a.items():
        if name not in b or b[name].shape == p.shape:
            continue
        if p.shape == rows and b[name].shape[1:] == p.shape[1:]:
            problems.append(
                f"the vocabulary differs: {name} has {p.shape[0]:,} rows in the base and {b[name].shape[0]:,} in the "
                "tuned one, and adapters of grown vocabularies are not written yet"
            )
        else:
            problems.append(f"{name} is {[*p.shape]} in the base and {[*b[name].shape]} in the tuned one")
    missing = [n for n in one.weights.missing if not any(part in HEADS for part in n.split("."))]
    return problems + [f"the base has no weights for {name}" for name in missing]


def _pieces(model: FolderModel, name: str) -> Iterator[Tensor]:
    """Return a weight's numbers in vectors of one length, from its file where they lie there as they are."""
    holder = model.weights.holder(name)
    unit = model.weights.unit_of[holder] if holder is not None else None
    if unit is not None and unit.converter is None:
        return model.weights.files.pieces(unit.sources[0])
    return iter(model.weights.weight(name).flatten().split(PIECE))


def _equal(base: Tensor, tuned: Tensor) -> bool:
    """Return whether two tensors have the same bits, the base's in the dtype of the tuned one."""
    base = base.to(tuned.dtype)
    return torch.equal(base, tuned) or torch.equal(_bytes(base), _bytes(tuned))


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().view(-1).view(torch.uint8)
