"""A composition of weight changes as a cross-encoder's folder: merged, for sentence-transformers and without us.

    config.json           the base's, with "sentence_transformers": {"activation_fn": …}
    model.safetensors     W + Σ ΔW, the head among it; the keys of the plain model, and no others
    tokenizer.json, …     with the longest pair as model_max_length
    onnx/model.onnx       the same model for onnxruntime, where asked for

`CrossEncoder(folder)` of sentence-transformers (4 to 6) opens it. Changes of activations cannot be merged: such a
composition is written by `ranking.folder`, for this library.
"""

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from addenda.compose.stack import Composition, Stack
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.sharded import refuse_sharded
from addenda.core.disk.access import amount_of, read_json, writing
from addenda.core.disk.atomic import readable, write_atomically
from addenda.core.disk.whole import free_place, whole
from addenda.core.forward.acting import blocks, enter
from addenda.core.merge.merge import merge, unmerge
from addenda.core.method.hidden import HiddenMethod
from addenda.core.modules.borrow import in_its_mode, training_mode
from addenda.core.modules.classes import original_class
from addenda.core.modules.ours import is_ours
from addenda.core.state.state import acting_again, apply_active, intact, record_of, state_of
from addenda.exporting.onnx_model import EXACT, far, run_onnx, write_onnx
from addenda.exporting.probe import probe_of
from addenda.models.pretrained import pretrained, pretrained_as, quiet

Activation = Literal["identity", "sigmoid"]
_ACTIVATIONS = {"identity": "torch.nn.modules.linear.Identity", "sigmoid": "torch.nn.modules.activation.Sigmoid"}
_PAIR = ("A small question?", "An answer, of 12 words or so.")
ONNX = Path("onnx", "model.onnx")  # where sentence-transformers looks for it


@dataclass(frozen=True)
class CrossEncoderReport:
    """What was written. moved: how far logits of the folder, and of its ONNX model, are from the live ones.

    left: what the reranker does and the folder cannot say.
    """

    path: Path
    adapters: tuple[str, ...]
    bytes: int
    moved: float
    onnx: float | None = None
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = " + ".join(self.adapters) or "the base"
        lines = [
            f"cross-encoder: {names} merged into {self.path}; {amount_of(self.bytes)}",
            f"read back: the largest logit moves by {self.moved:.1e}",
        ]
        if self.onnx is not None:
            lines.append(f"{ONNX}: by {self.onnx:.1e} in onnxruntime")
        return "\n".join([*lines, *self.left])


def mergeable(model: nn.Module, composition: Composition) -> str | None:
    """Return why a composition cannot be merged into the weights, or None where it can.

    Raises AddendaError for an adapter that is not on the model.
    """
    for c in composition.within():
        if not isinstance(c, Stack):
            return f"{type(c).__name__} gives parts of the input, or of the output, changes of their own"
    if composition.leave_out:
        return "it leaves layers out"
    for name in composition.names():
        methods = record_of(model, name).record.methods
        hidden = [p for p, m in methods.items() if isinstance(m, HiddenMethod)]
        if hidden:
            return (
                f"{name!r} changes what modules return ({methods[hidden[0]].name} at {hidden[0]}"
                f"{f' and {len(hidden) - 1} more' if len(hidden) > 1 else ''}), which no weight can hold"
            )
    return None


@checked()
@in_its_mode
def export_cross_encoder(
    model: nn.Module,
    composition: Composition,
    tokenizer: Any,
    out: str | Path,
    *,
    activation: Activation = "identity",
    max_length: int | None = None,
    onnx: bool = False,
    allow_loss: float | None = None,
) -> CrossEncoderReport:
    """Write a model with a stack of weight changes in its weights as a folder of sentence-transformers.

    composition: a Stack of adapters on the model. activation: what its `predict` applies to the logit. max_length: of
    a pair in tokens, as the folder's tokenizer then says. onnx: write `onnx/model.onnx` too (extra "onnx"). allow_loss:
    as in `merge`. The model is as it was afterwards, bit for bit.

    What was written is loaded again and must give the live model's logits, and onnxruntime the same, within 1e-5 of the
    largest. Only then does `out`, which must not exist, get its name. Raises AddendaError, with nothing written, where
    that fails, for a composition that no weight can hold, and for a model that does not write itself.
    """
    root, state = state_of(model)
    if activation not in _ACTIVATIONS:
        raise AddendaError(f"activation is one of {', '.join(_ACTIVATIONS)}, got {activation!r}.")
    place = free_place(out)
    refuse_sharded(root, "nothing can be exported from it")
    if state.merged is not None:
        raise AddendaError("A change is merged into the base. Call unmerge(model) first.")
    if (reason := mergeable(root, composition)) is not None:
        raise AddendaError(
            f"{composition!r} cannot be merged: {reason}. Export it as base, adapters and composition, "
            "ranking.folder.save_folder, which Reranker.load opens."
        )
    if not callable(getattr(root, "save_pretrained", None)):
        raise AddendaError(f"A {original_class(root).__name__} has no save_pretrained, so there is no folder of it.")
    names = tuple(composition.names())
    for name in names:
        intact(root, name, record_of(root, name).record)
    batch = _probe(root, tokenizer)
    with whole(place, folder=True) as folder:
        live = _merged(root, state, names, folder, batch, allow_loss)
        _settle(folder, tokenizer, activation, max_length)
        _check_keys(root, folder)
        weight = next(p for p in root.parameters() if p.is_floating_point())
        again = pretrained_as(original_class(root), folder, dtype=weight.dtype, use_safetensors=True)
        again = again.to(weight.device).eval()
        moved = far(_logits(again, batch), live)
        _check(moved, "The folder, read back,", weight.dtype)
        by_onnx = None
        if onnx:
            write_onnx(again, batch, folder / ONNX)
            by_onnx = far(run_onnx(folder / ONNX, batch), live)
            _check(by_onnx, "The ONNX model in onnxruntime", weight.dtype)
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return CrossEncoderReport(place, names, size, moved, by_onnx)


def _probe(root: Any, tokenizer: Any) -> dict[str, Tensor]:
    """Return a small batch as the tokenizer makes them of pairs: with types where it gives types."""
    batch = probe_of(root)
    ids = batch.get("input_ids")
    if ids is not None and "token_type_ids" in (getattr(tokenizer, "model_input_names", None) or ()):
        kinds = getattr(getattr(root, "config", None), "type_vocab_size", None) or 1
        batch["token_type_ids"] = torch.zeros_like(ids)
        batch["token_type_ids"][:, ids.shape[1] // 2 :] = min(1, kinds - 1)
    return batch


def _merged(root: Any, state, names: tuple[str, ...], folder: Path, batch: dict, allow_loss: float | None) -> Tensor:
    """Write the merged model into an empty folder, and return the logits that the live adapters give."""
    around = blocks()  # which a merge leaves, and an unmerge would take for those of somebody else
    with acting_again(root, state):
        apply_active(root, state, names)
        live = _logits(root, batch)
        if names:
            merge(root, allow_loss=allow_loss)
        try:
            with writing(folder), quiet():
                root.save_pretrained(folder)
        finally:
            enter(around)
            if names:
                unmerge(root)
    return live


@torch.no_grad()
def _logits(model: nn.Module, batch: dict) -> Tensor:
    with training_mode(model, False):
        found = model(**batch)
    logits = getattr(found, "logits", None)
    if not isinstance(logits, Tensor):
        raise AddendaError(f"A cross-encoder has logits, and this {original_class(model).__name__} gives none.")
    return logits.float()


def _settle(folder: Path, tokenizer: Any, activation: str, max_length: int | None) -> None:
    """Write the tokenizer beside the weights, and what sentence-transformers reads into config.json."""
    write_tokenizer(tokenizer, folder, max_length)
    file = folder / "config.json"
    config = read_json(file, foreign=True)
    config["sentence_transformers"] = {"activation_fn": _ACTIVATIONS[activation]}
    write_atomically(file, (readable(config) + "\n").encode())


def write_tokenizer(tokenizer: Any, folder: Path, max_length: int | None = None) -> None:
    """Write a tokenizer into a folder. max_length: of a text, as it then says.

    Raises AddendaError where what is read back encodes a pair in another way: not all that a tokenizer was told since
    it was made is in its files.
    """
    own = deepcopy(tokenizer)
    if max_length is not None:
        own.model_max_length = max_length
    with writing(folder), quiet():
        own.save_pretrained(folder)
    again = pretrained("AutoTokenizer", folder)
    wanted, found = (dict(t(*_PAIR)) for t in (tokenizer, again))
    if wanted != found:
        differs = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        raise AddendaError(
            f"The tokenizer, read back from its files, encodes a pair in another way ({', '.join(differs)} differ). "
            "Set what it was told as an argument when it is made, so that it is saved."
        )


def _check_keys(root: nn.Module, folder: Path) -> None:
    """Raise AddendaError where the written weights have keys that the plain model has not."""
    known = {k for k in root.state_dict() if not is_ours(k)}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        if foreign := sorted(header.keys() - known - {"__metadata__"}):
            raise AddendaError(f"Weights would be written that the plain model has not: {', '.join(foreign[:6])}.")


def _check(moved: float, what: str, dtype: torch.dtype) -> None:
    limit = EXACT if dtype in (torch.float32, torch.float64) else 2.0**-6
    if not moved <= limit:
        raise AddendaError(
            f"{what} gives other logits than the live model: they move by {moved:.1e} of the largest, more than "
            f"{limit:.0e}. Nothing was written."
        )
