"""The head of a masked LM: fitted first where a folder has none, and kept in a file beside the language's adapter.

An encoder that was trained to place texts (e5, MiniLM) has embeddings but no head: h·Eᵀ of its states says no more
than chance. So what stands between its states and the tied embeddings, a dense layer, its norm and a bias over tokens,
is fitted with the encoder frozen. States are computed for half of the steps and read twice.

The bias starts as the logarithm of how often each token occurs; those that the texts do not have get that of half an
occurrence. The head is no part of the language's adapter: a reranker has no use for it, and one head may serve many.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.adapter.handle import adapters
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of, shown
from addenda.core.file.states import read_state, write_state
from addenda.core.modules.borrow import training_mode
from addenda.core.modules.ours import is_ours
from addenda.core.modules.wrappers import unwrap
from addenda.core.state.outside import drawn_at_random, drawn_in
from addenda.core.state.state import find_state
from addenda.data.batches import batches
from addenda.data.encoded import IGNORE
from addenda.data.masked import Masked
from addenda.models.machine import device_of
from addenda.train import chunked
from addenda.train.loss import inputs_of
from addenda.train.masked_logits import body_of, given_states, logits_at, states_at

FILE, TRAINED = "head.safetensors", "head-trained.safetensors"
STEPS, RATE, PASSES = 300, 1e-3, 2
_SIGN = "masked head"


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what the head has for itself, by name: all that is neither the encoder's nor the output embedding's table.

    Raises AddendaError for a model whose head is not apart from its encoder.
    """
    body, decoder = body_of(model), chunked.head_of(model)
    if body is None or decoder is None:
        raise AddendaError(f"{type(model).__name__} has no head apart from its encoder.")
    shared = {id(p) for p in body.parameters()} | {id(getattr(decoder, "weight", None))}
    return {n: p for n, p in unwrap(model).named_parameters() if id(p) not in shared and not is_ours(n)}


def modules_of(model: nn.Module) -> list[str]:
    """Return the modules of the head that can be trained as copies: the largest that hold no output embedding."""
    body, decoder, found = body_of(model), chunked.head_of(model), []
    for path, module in unwrap(model).named_modules():
        inside = any(path.startswith(f"{p}.") for p in found)
        if not path or inside or is_ours(path) or any(m is body or m is decoder for m in module.modules()):
            continue
        if body is not None and any(m is module for m in body.modules()):
            continue
        if any(True for _ in module.parameters()):
            found.append(path)
    return found


def fit_head(
    model: nn.Module,
    data: Masked,
    *,
    steps: int = STEPS,
    batch: int = 16,
    rate: float = RATE,
    seed: int = 0,
    passes: int = PASSES,
    fresh: bool = True,
    watch: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Fit a masked LM's head to its frozen encoder, in place, and return the loss of every step, in nats.

    steps: of AdamW, the rate falling to 0. passes: how often the states of a batch are read. fresh: whether the bias
    starts with the tokens' frequencies. watch: called with (step, loss). On an error the head is what it was.
    Raises AddendaError for a loss that is not finite.
    """
    own, device, flags = parameters_of(model), device_of(model), [(p, p.requires_grad) for p in model.parameters()]
    before = {n: p.detach().clone() for n, p in own.items()}
    known: list[tuple[Tensor, Tensor]] = []
    count = max(1, steps // passes)
    rows, losses = batches(data.lengths, batch, count, seed, data.ragged), []
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        for p in own.values():
            p.requires_grad_(True)
        if fresh:
            _start_bias(model, data)
        exact = {n: p.detach().float().clone() for n, p in own.items()}  # bfloat16 would round small steps to nothing
        optimizer = torch.optim.AdamW(exact.values(), lr=rate, weight_decay=0.0)
        with training_mode(model, False):
            for step in range(steps):
                if step < count:
                    known.append(_states(model, data.drawn(step), rows[step], device))
                states, wanted = known[step % count]
                table = None if data.table is None else torch.from_numpy(data.table).to(device)
                logits = _logits(model, states, table)
                loss = F.cross_entropy(logits.float(), wanted)
                if not torch.isfinite(loss):
                    raise AddendaError(
                        f"The head's loss is {loss.item()} at step {step + 1}: use another model or dtype."
                    )
                loss.backward()
                optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
                _step(optimizer, exact, own)
                losses.append(loss.item())
                if watch is not None:
                    watch(step + 1, losses[-1])
    except BaseException:
        with torch.no_grad():
            for n, p in own.items():
                p.copy_(before[n])
        raise
    finally:
        for p, flag in flags:
            p.grad = None
            p.requires_grad_(flag)
    _known(model, own)
    return losses


@torch.no_grad()
def _step(optimizer: torch.optim.Optimizer, exact: dict[str, Tensor], own: dict[str, nn.Parameter]) -> None:
    """Take a step in float32 from the gradients of the head's parameters, and round it into them."""
    for n, p in own.items():
        exact[n].grad = None if p.grad is None else p.grad.float()
        p.grad = None
    optimizer.step()
    for n, p in own.items():
        p.copy_(exact[n])


def _states(model: nn.Module, data: Masked, rows: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    given = {k: t.to(device) for k, t in data.batch(rows).items()}
    seen = given["labels"] != IGNORE
    return states_at(model, inputs_of(model, given), seen), given["labels"][seen]


def _logits(model: nn.Module, states: Tensor, table: Tensor | None) -> Tensor:
    """Return the logits (N, tokens) of states (N × d): the head alone, with a gradient."""
    row = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
    with given_states(model, states):
        return logits_at(model, {"input_ids": row}, torch.ones_like(row, dtype=torch.bool), table)


@torch.no_grad()
def _start_bias(model: nn.Module, data: Masked) -> None:
    bias = getattr(chunked.head_of(model), "bias", None)
    if bias is None or id(bias) not in {id(p) for p in parameters_of(model).values()}:
        return
    counts = torch.bincount(torch.tensor([t for row in data.ids for t in row]), minlength=len(bias)).float()
    bias.copy_((counts.clamp(min=0.5) / counts.sum()).log()[: len(bias)])


def save_head(model: nn.Module, path: Path, identity: str = "") -> Path:
    """Write a masked LM's head to a file, whole or not at all. identity: of what it was fitted with.

    Where adapters on the model train copies of it, the copies are written.
    """
    sites = [s for a in adapters(model).values() for s in a.sites()] if find_state(model) else []
    copies = {path: held.stored()["value"] for path, held in sites if "value" in held.stored()}
    own = {n: copies.get(n, p).detach().cpu().contiguous() for n, p in parameters_of(model).items()}
    write_state(path, {_SIGN: type(unwrap(model)).__name__, "identity": identity, "tensors": own}, _SIGN)
    return path


def load_head(model: nn.Module, path: str | Path) -> str:
    """Put the head of a file on a masked LM, in place, and return the identity of what it was fitted with.

    Raises AddendaError for a file that is none, and one of another head (names and shapes), with nothing changed.
    """
    file = path_of(path, "head")
    identity, tensors = _read(file)
    own = parameters_of(model)
    there, here = ({n: tuple(t.shape) for n, t in side.items()} for side in (tensors, own))
    if there != here:
        odd = [f"{n} {there.get(n, 'none')} in the file, {here.get(n, 'none')} in the model"
               for n in dict.fromkeys([*there, *here]) if there.get(n) != here.get(n)]  # fmt: skip
        raise AddendaError(
            f"{shown(file)} is the head of another model: {'; '.join(map(str, odd[:4]))}. Fit one for this."
        )
    if bad := [n for n, t in tensors.items() if not torch.isfinite(t).all()]:
        raise AddendaError(f"{shown(file)} holds values that are not finite: {', '.join(bad[:4])}. Fit the head again.")
    with torch.no_grad():
        for n, p in own.items():
            p.copy_(tensors[n])
    _known(model, own)
    return identity


def _known(model: nn.Module, own: dict[str, nn.Parameter]) -> None:
    """Note that a head is no longer as it was drawn, under whatever names tied tensors have."""
    bare, ids = unwrap(model), {id(p) for p in own.values()}
    left = {n for n, p in bare.named_parameters(remove_duplicate=False) if id(p) not in ids}
    drawn_at_random(bare, [n for n in drawn_in(bare) if n in left])


def identity_in(path: Path) -> str:
    """Return what identifies the call that a head was fitted by. Raises AddendaError for a file that is none."""
    return _read(path)[0]


def _read(file: Path) -> tuple[str, dict[str, Tensor]]:
    state = read_state(file)
    tensors = state.get("tensors") if isinstance(state, dict) and _SIGN in state else None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise AddendaError(f"{shown(file)} is no head of a masked LM; `tune --task masked` writes one ({FILE}).")
    return str(state.get("identity", "")), tensors


def is_head(path: Path) -> bool:
    """Return whether a file is a head that was written here."""
    try:
        return bool(_read(path))
    except AddendaError:
        return False
