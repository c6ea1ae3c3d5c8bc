"""What a teacher thinks of every token of its answers: the distribution over one vocabulary that a student learns.

    soft = soften(teacher, tokenizer, labels.data())              # all of each distribution, in memory
    soft = soften(teacher, tokenizer, labels.data(), top_k=16)    # its 16 likeliest tokens and the rest together: kept

At label i the loss is the cross-entropy −Σ_v p_v log q_v of the teacher's p and the student's q, which is KL(p‖q) and
the teacher's entropy: its gradient by the student's logits is q − p, and 0 where both are alike. With top_k, p and q
are compared on k tokens and on all others as one, log q_rest = log Σ_{v not among them} exp(z_v) − log Σ_v exp(z_v): a
KL of coarser distributions, whose gradient is 0 in the same place. Prompt tokens carry no label, and so no loss.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import amount_of
from addenda.core.disk.cache import cache_folder, trim
from addenda.core.file.identity import digest
from addenda.core.file.states import keep, kept
from addenda.core.modules.borrow import training_mode
from addenda.data.encode import Tokens, encode
from addenda.data.encoded import IGNORE
from addenda.data.examples import Data
from addenda.data.limits import within
from addenda.models.machine import device_of
from addenda.train.loss import score
from addenda.transferring.label import ROOM, teacher_hash
from addenda.transferring.question import context_of

MOST = 4 << 30  # bytes of distributions in memory


def soft_cross_entropy(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the loss (N) of logits (N × V) under batch["teacher"], log-probabilities of the teacher.

    They are (N × V), or (N × k) of the tokens batch["among"] (N × k), with all other tokens as one. In float32, or in
    float64 where logits are.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    logp = batch["teacher"].to(z)
    if "among" not in batch:
        return -(logp.exp() * z.log_softmax(-1)).sum(-1)
    among, every = batch["among"], z.logsumexp(-1, keepdim=True)
    inside = (logp.exp() * (z.gather(-1, among) - every)).sum(-1)
    if among.shape[-1] == z.shape[-1]:  # there are no others
        return -inside
    others = z.scatter(-1, among, -torch.inf).logsumexp(-1) - every[:, 0]
    return -inside - (1 - logp.exp().sum(-1)).clamp(min=0) * others


@dataclass(frozen=True)
class Soft(Tokens):
    """Tokenised answers, with a teacher's log-probabilities of each label of a row (labels × V, or × k with `among`).

    whose: hash of all that decides them.
    """

    teacher: list[Tensor] = field(default_factory=list)
    among: list[Tensor] | None = None
    whose: str = ""
    objective: Any = soft_cross_entropy

    @cached_property
    def digest(self) -> str:
        """SHA-256 of ids, labels and what decides the distributions."""
        sha = hashlib.sha256(f"{self.whose}{None if self.among is None else len(self.among[0][0])}".encode())
        for ids, labels in zip(self.ids, self.labels, strict=True):
            sha.update(f"{ids}{labels}".encode())
        return sha.hexdigest()

    def take(self, rows: Sequence[int]) -> "Soft":
        made: Any = super().take(rows)
        among = None if self.among is None else [self.among[i] for i in rows]
        return replace(made, teacher=[self.teacher[i] for i in rows], among=among)

    def batch(self, rows: Sequence[int], skip: int = 0) -> dict[str, Tensor]:
        """Return these rows as `Tokens.batch` does, with "teacher" and "among" of their labels, one row after another.

        skip: as there; it must leave all labels in.
        """
        made = super().batch(rows, skip) | {"teacher": torch.cat([self.teacher[i] for i in rows])}
        return made if self.among is None else made | {"among": torch.cat([self.among[i] for i in rows]).long()}


@checked()
@torch.no_grad()
def soften(
    model: Any,
    tokenizer: Any,
    data: Data,
    *,
    top_k: int | None = None,
    batch: int = 16,
    chat: bool | None = None,
    max_length: int | None = None,
    folder: str | Path | None = None,
) -> Soft:
    """Return what a teacher, as it acts now, gives each token of the answers in data, up to their ends.

    top_k: keep the k likeliest tokens of each, on disk too (`soft` in addenda's folder for caches unless folder says
    another); None: all, in memory only, in the logits' own precision and at least float32.
    Raises AddendaError for distributions that would take more than 4 GiB, and what `encode` refuses.
    """
    limit = within(max_length or context_of(model), model)
    made = encode(data, tokenizer, chat=chat, max_length=limit)
    assert isinstance(made, Tokens)
    count = sum(sum(t != IGNORE for t in row) for row in made.labels)
    width = int(getattr(model.config, "vocab_size", 0))
    size = 4 * count * (width if top_k is None else 3 * top_k)
    if size > MOST:
        raise AddendaError(
            f"The teacher's distributions over {width:,} tokens at {count:,} labels take {amount_of(size)}. Keep the "
            "likeliest tokens of each with top_k=, such as 64, or give fewer inputs."
        )
    whose = teacher_hash(model, tokenizer, batch=batch, examples=made.digest)
    named = None if whose is None else digest([whose, top_k])
    place = (cache_folder() / "soft") if folder is None else Path(folder)
    file = None if named is None or top_k is None else place / f"{named}.safetensors"
    known = None if file is None else kept(file, lambda s: _is_sound(s, count, top_k))
    if known is None:
        known = _distributions(model, made, top_k, batch)
        if file is not None:
            keep(file, known, "teacher's distributions")
            if folder is None:
                trim(place, ROOM)
    sizes = [sum(t != IGNORE for t in row) for row in made.labels]
    among = None if top_k is None else list(known["among"].split(sizes))
    fields = {k: getattr(made, k) for k in ("ids", "labels", "kind", "pad", "types", "names", "said")}
    return Soft(**fields, teacher=list(known["logp"].split(sizes)), among=among, whose=named or "")


def _distributions(model: Any, made: Tokens, top_k: int | None, batch: int) -> dict[str, Tensor]:
    """Return log-probabilities at all labels in the order of the rows, and of which tokens they are."""
    device, parts = device_of(model), []
    with training_mode(model, False):
        for at in range(0, len(made), batch):
            rows = range(at, min(at + batch, len(made)))
            tensors = {k: t.to(device) for k, t in made.batch(rows).items()}
            logits = score(model, tensors, "causal", keep=True).logits
            assert logits is not None
            logp = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
            if top_k is not None:
                parts.append([t.cpu() for t in logp.topk(min(top_k, logp.shape[-1]), dim=-1)])
            else:
                parts.append([logp.cpu()])
    whole = [torch.cat(column) for column in zip(*parts, strict=True)]
    return {"logp": whole[0]} if top_k is None else {"logp": whole[0], "among": whole[1].int()}


def _is_sound(state: Any, count: int, top_k: int | None) -> bool:
    logp, among = state["logp"], state["among"]
    shaped = logp.shape == among.shape and len(logp) == count and logp.shape[-1] <= (top_k or 0)
    return shaped and among.dtype == torch.int32 and bool(torch.isfinite(logp).all()) and float(logp.max()) <= 1e-6
