"""`tune(task="masked")`: what a run of a masked LM reads, and the head that it begins with.

    tune("e5", "de.txt", "pfeiffer:rank=192", task="masked", out="de/")      # a part for German

The folder of the run holds head.safetensors beside adapter.safetensors: the head that the run began with, fitted to the
same texts where the model's folder has none (see `masked_head`). It stays as it is, or with train_head=True learns
along, and is head-trained.safetensors then. The adapter's file has no head in it, so that it loads under any other.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from torch import nn

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of
from addenda.core.disk.place import check_free, is_first
from addenda.core.file.identity import base_of, digest, versions
from addenda.core.state.outside import drawn_in
from addenda.data.examples import Data
from addenda.data.masked import Masked, Vocabulary, masked
from addenda.data.read import read
from addenda.models.load import Loaded, load_model
from addenda.quantizing.bridges import adopt
from addenda.train import checkpoint
from addenda.train.inputs import as_loaded, held_out
from addenda.train.masked_head import (
    FILE,
    RATE,
    STEPS,
    TRAINED,
    fit_head,
    identity_in,
    is_head,
    load_head,
    modules_of,
    save_head,
)


@dataclass(frozen=True)
class Masking:
    """How a masked LM is trained. The fields are keywords of `tune` and options of `addenda tune`.

    head: a file of a head to begin with. head_steps: of fitting one; None: 300 where the model's folder has none, else
    none. train_head: whether it learns along with the adapter. vocabulary: of the loss, see `data.masked`.
    """

    head: str | Path | None = None
    head_steps: int | None = None
    train_head: bool = False
    vocabulary: Vocabulary = "texts"

    @classmethod
    def asked(cls, task: str | None, model: Any, others: dict[str, Any], **given: Any) -> "Masking | None":
        """Return the options of a call, None where it is not about masks. others: which are for other tasks, if given.

        Raises AddendaError for what cannot be, or does not belong together.
        """
        if task not in (None, "masked"):
            raise AddendaError(f"task is 'masked' or left out (the model and the data say the rest), got {task!r}.")
        made = cls(**given)
        if task is None:
            if named := [n for n, v in vars(made).items() if v != getattr(cls, n)]:
                raise AddendaError(f"{named[0]}= is for masked LMs: give task='masked' too.")
            return None
        if made.vocabulary not in get_args(Vocabulary):
            raise AddendaError(f"vocabulary must be 'texts' or 'all', got {made.vocabulary!r}.")
        if wrong := [f"{n}={v!r}" for n, v in others.items() if v]:
            raise AddendaError(f"{', '.join(wrong)} cannot be used with task='masked', which learns plain texts.")
        if made.head is not None and made.head_steps:
            raise AddendaError("Give head=, a file, or head_steps=, which fits one; not both.")
        if isinstance(model, nn.Module):
            if made.head is not None or made.head_steps:
                raise AddendaError(
                    "head= and head_steps= are for folders; a loaded model gets its head with load_head or fit_head of "
                    "addenda.train.masked_head."
                )
            if drawn := drawn_in(model):
                raise AddendaError(
                    f"{len(drawn)} tensors of this model were drawn at random as it was loaded ({drawn[0]}, …). "
                    "Fit its head first with fit_head of addenda.train.masked_head, or give the folder."
                )
        return made

    def read(
        self, model: Any, data: Any, eval_data: Any, tokenizer: Any, columns: dict, loading: dict
    ) -> tuple[Loaded, Data, Data | None]:
        """Return the model, the texts to learn from and those to judge by. Raises AddendaError for each."""
        train, held = read(data, task="masked", **columns), None
        if eval_data is not None:
            train, held = held_out(train, eval_data, "masked", loading["seed"], columns)
        if isinstance(model, nn.Module):
            adopt(model)
            return as_loaded(model, tokenizer), train, held
        return load_model(str(model), task="masked", **loading), train, held

    def encoded(
        self, train: Data, held: Data | None, tokenizer: Any, limit: int | None, seed: int
    ) -> tuple[Masked, Masked | None]:
        """Return the texts as the model takes them; see `data.masked.masked`."""
        return masked(train, held, tokenizer, limit=limit, seed=seed, vocabulary=self.vocabulary)

    def headed(
        self, loaded: Loaded, data: Masked, folder: Path | None, *, batch: int, seed: int, resume: bool,
        say: Callable[[str], None],
    ) -> Loaded:  # fmt: skip
        """Return the model with a head: its own, a file's, or one fitted now (or before, in the run's folder).

        What the run begins with is written into its folder, unless it is the model's own.
        Raises AddendaError for a file of another model, and a folder with the head of another run.
        """
        model, file = loaded.model, None if folder is None else folder / FILE
        if file is not None:
            check_free(file.parent, {FILE: is_head, TRAINED: is_head})
        steps = self.head_steps if self.head_steps is not None else STEPS if loaded.fresh else 0
        if self.head is not None:
            identity = load_head(model, path_of(self.head, "head"))
        elif steps:
            about = [base_of(model), data.digest, steps, batch, seed, RATE, versions()]
            identity = digest(about)
            if self._fitted(model, file, identity, resume):
                return replace(loaded, fresh=())
            say(f"fitting a head to the frozen encoder: {steps:,} steps")
            losses = fit_head(model, data, steps=steps, batch=batch, seed=seed, fresh=bool(loaded.fresh))
            say(f"the head's loss: {losses[0]:.3f} nats at step 1, {losses[-1]:.3f} at step {steps:,}")
        else:
            return loaded
        if file is not None and is_first():
            file.parent.mkdir(parents=True, exist_ok=True)
            save_head(model, file, identity)
        return replace(loaded, fresh=())

    def _fitted(self, model: nn.Module, file: Path | None, identity: str, resume: bool) -> bool:
        """Put the head on that this very run has fitted before, and return whether there was one."""
        if file is None or not file.is_file() or not resume:
            return False
        if identity_in(file) == identity:
            load_head(model, file)
            return True
        if checkpoint.latest(file.parent / "checkpoints") is not None:
            raise AddendaError(
                f"{file} is the head of another run: other texts, model, seed or steps. Repeat that call to go on with "
                "it, or start again with resume=False (--no-resume) or in another folder (--out)."
            )
        return False

    def heads(self, model: nn.Module) -> list[str]:
        """Return the modules that the adapter trains as copies: the head's, where it learns along."""
        return modules_of(model) if self.train_head else []

    def keep(self, model: nn.Module, folder: Path) -> None:
        """Write the head that has learned along into the run's folder."""
        if self.train_head:
            save_head(model, folder / TRAINED)
