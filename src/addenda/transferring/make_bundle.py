"""Making a bundle, while a task's data is there: seeds drawn, negatives made of them, a discriminator fitted.

    made = make_bundle(model, tokenizer, "task.safetensors", "task.jsonl", "task.bundle")
    print(made)          # how good the discriminator is, and that the seeds are task data

The model is the adapter's base, and is afterwards what it was. Negatives are what the base without the adapter makes of
the seeds; at a transfer the next base makes them, and the discriminator is asked about those (Trans-LoRA,
arXiv:2405.17258). A call that was killed has written nothing, and the same call makes the same file again.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from addenda.core.adapter.attach import detach
from addenda.core.adapter.blocks import disabled
from addenda.core.adapter.handle import Adapter, adapters
from addenda.core.base.arguments import checked, names_of
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.disk.access import path_of
from addenda.core.disk.place import file_for
from addenda.core.file.identity import versions
from addenda.core.file.trained_on import content_hash
from addenda.core.modules.wrappers import unwrap
from addenda.core.state.state import free_name, names_on
from addenda.core.state.undo import undone
from addenda.core.state.vocabulary import grown_of
from addenda.data.encode import use_chat
from addenda.data.read import read
from addenda.models.kinds import check_module
from addenda.train.fit import Progress
from addenda.transferring.bundle import Bundle, Side, adapter_file, is_bundle
from addenda.transferring.discriminator import ADAPTER, LEAST, fit_discriminator
from addenda.transferring.inputs import draw_seeds, inputs_of
from addenda.transferring.question import Wording, asked
from addenda.transferring.sides import put_on
from addenda.transferring.synthesise import Accepts, Sampler, check_seeds, synthesise

Given = str | Path | Adapter
MANY = 1000  # inputs: more teach a discriminator little


@dataclass(frozen=True)
class BundleReport:
    """What `make_bundle` made. negatives: different texts that the discriminator learned to refuse; seconds: in all."""

    path: Path
    bundle: Bundle
    negatives: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.bundle}\n{self.negatives:,} negatives, {self.seconds:,.0f} s; written: {self.path}"


@checked(also=names_of(read, without=("task",)))
def make_bundle(
    model: nn.Module,
    tokenizer: Any,
    adapter: Given,
    data: Any,
    out: str | Path,
    *,
    seeds: int | Sequence[str] = 5,
    name: str | None = None,
    count: int | None = None,
    negatives: Sequence[str] | None = None,
    method: Any = "lora:rank=8",
    answers: Sequence[str] = ("yes", "no"),
    chat: bool | None = None,
    steps: int = 200,
    batch: int = 16,
    rate: float = 1e-3,
    seed: int = 0,
    held_share: float = 0.2,
    early_stop: int = 3,
    temperature: float = 1.0,
    format: str | re.Pattern | Accepts | None = None,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    **columns,
) -> BundleReport:
    """Write the bundle of an adapter: what a transfer to another base needs instead of the data.

    model: the adapter's base, with or without it. adapter: its file, its name on the model, or itself. data: what
    `data.read` takes, with its options; the inputs are its questions. seeds: how many are drawn, or the seeds. name: of
    the task, as the discriminator is asked about it; by default the file's. count: N, how many inputs, drawn, the
    discriminator learns from, and how many a transfer is to make; by default all, a thousand at most. negatives:
    instead of the N that the base makes of the seeds at `temperature`, in a format as `synthesise` takes it; say: is
    told how that goes on. The rest is `fit_discriminator`'s.

    Raises AddendaError before anything is trained for seeds that are too few, equal, empty or too long for the model,
    words for yes and no that are no single tokens, data without questions, an adapter of another base or with new
    tokens, and a file that somebody else has written at `out`; the model is as it was whatever happens.
    """
    started, place = time.perf_counter(), file_for(path_of(out, "out"), is_bundle, what="out")
    check_module(model)
    examples = read(path_of(data) if isinstance(data, str | Path) else data, **columns)
    inputs, task = inputs_of(examples), name or _name_of(examples.source)
    wording = Wording.of(tokenizer, task, chat=chat, answers=answers)
    known = list(dict.fromkeys(inputs.texts))
    drawn = draw_seeds(known, seeds, seed=seed) if isinstance(seeds, int) else tuple(check_seeds(seeds))
    if len(known) < LEAST:
        raise AddendaError(f"{examples.source} has {len(known)} different inputs, and {LEAST} are wanted at least.")
    if count is not None and not LEAST <= count <= len(known):
        raise AddendaError(f"count= is how many of {len(known)} inputs are used, {LEAST} at least; got {count}.")
    count = min(len(known), MANY) if count is None else count
    used = [known[i] for i in Stream(seed, "inputs").choice(len(known), count).tolist()]
    asked(model, tokenizer, wording, [*drawn, *used])  # all of them fit, or this says which does not
    Sampler(model, tokenizer, drawn, temperature=temperature, format=format)  # so does their list
    with undone(model):
        source, new = put_on(model, tokenizer, adapter)
        try:
            _check_vocabulary(model)
            teacher = Side.of(model, tokenizer, use_chat(tokenizer, chat))
            if negatives is None:
                with disabled(model):
                    made = synthesise(
                        model, tokenizer, drawn, count, temperature=temperature, seed=seed, format=format,
                        batch=2 * batch, say=say,
                    )  # fmt: skip
                negatives = made.texts
            free = free_name(model, ADAPTER)
            judged = fit_discriminator(
                model, tokenizer, used, negatives, name=task, method=method, adapter=free, chat=chat, answers=answers,
                steps=steps, batch=batch, rate=rate, seed=seed, held_share=held_share, early_stop=early_stop,
                progress=progress,
            )  # fmt: skip
            judge = adapters(model)[free]
            about = {
                "seed": seed, "steps": steps, "batch": batch, "rate": rate, "held_share": held_share,
                "method": judge.kinds, "negatives": len({*negatives}), "temperature": temperature,
                "versions": versions(),
            }  # fmt: skip
            bundle = Bundle(
                task, count, drawn, inputs.system, use_chat(tokenizer, chat), teacher, content_hash(source),
                Side.of(model, tokenizer, wording.chat), judged, adapter_file(judge), about,
            )  # fmt: skip
            detach(model, free)
        finally:
            if new and source.name in names_on(model):
                detach(model, source.name)
    path = bundle.save(place)
    return BundleReport(path, bundle, len({*negatives}), time.perf_counter() - started)


def _check_vocabulary(model: nn.Module) -> None:
    """Raise AddendaError for a model whose vocabulary has grown: another base knows nothing of its tokens."""
    grown = grown_of(unwrap(model))
    if grown is not None:
        tokens = ", ".join(map(repr, list(grown.vocabulary.tokens)[:4]))
        raise AddendaError(
            f"The model has a vocabulary that has grown ({tokens}), as an adapter with new tokens brings it, and these "
            "cannot move to another base. Train an adapter without new tokens, and make the bundle of that."
        )


def _name_of(source: str) -> str:
    """Return the name of a task by where its data is: a file's stem, or what a task in memory is called."""
    return re.sub(r"[^\w-]+", "-", Path(source).stem).strip("-") or "task"
