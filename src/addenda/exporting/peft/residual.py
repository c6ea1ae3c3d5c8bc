"""LORA that started inside of W: PEFT took s B0 A0 out of the base in memory, and trained B and A beside the rest.

The folder holds B and A alone, so its change of the base as it is stored is ΔW = s (B A − B0 A0): a product of rank
2 r. B0 A0 is found from W where it is a function of W (PiSSA, OLoRA); where data or chance made it, the folder is not
enough (LoRA-GA, CorDA, LoftQ, PiSSA by a randomised decomposition): these are refused. EVA, orthogonal, Gaussian and
MiCA starts leave the base as it is. PEFT itself finds B0 A0 anew when it loads PiSSA and OLoRA, loads LoRA-GA as if
nothing had been taken out, and cannot load CorDA without its data.
"""

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.exporting.peft.conversion import Config, Saved

_UNKNOWN = {
    "lora_ga": "LoRA-GA took directions of a gradient",
    "corda": "CorDA took directions found from data",
    "loftq": "LoftQ put a base in few bits in the place of the base,",
    "pissa_niter_": "PiSSA by a randomised decomposition took directions that depend on chance",
}
_UNTOUCHED = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "pissa", "olora")


def check(config: Config) -> None:
    """Raise AddendaError where the base was replaced by something that the folder does not say, or nobody knows."""
    start = config.get("init_lora_weights", True)
    if (isinstance(start, str) and start.lower() in _UNTOUCHED) or start in (True, False, None):
        return
    for name, what in _UNKNOWN.items():
        if isinstance(start, str) and start.startswith(name):
            raise AddendaError(
                f"This LORA adapter of PEFT was made with init_lora_weights={start!r}: {what} out of the base, and the "
                "folder does not hold them, so what it changes of the base cannot be known. Save it in PEFT with "
                "save_pretrained(folder, path_initial_model_for_weight_conversion=…), which writes a plain LORA."
            )
    raise AddendaError(f"init_lora_weights={str(start)[:60]!r} of this PEFT adapter is no start that addenda knows.")


def taken_out(config: Config, s: Saved, rank: int, scale: float) -> tuple[Tensor, Tensor] | None:
    """Return (B0: m × r, A0: r × n), s B0 A0 of which PEFT took out of W; None where it took nothing.

    Raises AddendaError for layers on which PEFT does not do it as it says.
    """
    start = config.get("init_lora_weights", True)
    start = start.lower() if isinstance(start, str) else start
    if start not in ("pissa", "olora") or "lora_embedding_A" in s.tensors:
        return None
    if not s.site.kind.dense:
        raise AddendaError(f"{s.path}: PEFT has no init_lora_weights={start!r} for a {s.site.kind.name}.")
    W = s.site.matrix.cpu().double()
    if start == "pissa":
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        return U[:, :rank].float(), (S[:rank, None] * Vt[:rank] / scale).float()
    if s.site.kind.transposed:  # PEFT takes Q R of the weight as it is stored
        Q, R = torch.linalg.qr(W.T)
        return R[:rank].T.float(), Q[:, :rank].T.float()
    Q, R = torch.linalg.qr(W)
    return Q[:, :rank].float(), R[:rank].float()
