"""The folder of a lottery run: what the run is, its positions, its phases' checkpoints, its result."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of, shown
from addenda.core.disk.place import check_free, folder_for
from addenda.core.file.identity import base_of, digest, goes_on, plain, versions
from addenda.core.file.save import save
from addenda.core.file.sealed import read_sealed, write_sealed
from addenda.core.file.states import read_state, write_state
from addenda.core.state.state import find_state
from addenda.data.encoded import Encoded
from addenda.train import checkpoint

NOTE, ADAPTER = "lottery.json", "adapter.safetensors"


class LotteryFolder:
    """The files of one run. resume: whether what an interrupted one has left is gone on with."""

    def __init__(self, out: Path, resume: bool):
        self.out, self.resume = folder_for(path_of(out)), resume

    def begin(
        self,
        model: nn.Module,
        data: Encoded,
        held: Encoded | None,
        heads: Sequence[str],
        sites: Sequence[str],
        around: Sequence[str],
        what: Mapping[str, Any],
    ) -> "LotteryFolder":
        """Write down what the run is, or compare it with the one that is there. around: adapters that act beside it.

        Raises AddendaError where the folder is of another run, or holds what is none of one.
        """
        noted = is_of_lottery(self.out)  # without a note nothing there is of such a run, whatever its name
        ours = {_positions(i): lambda p: noted and _is_positions(p) for i in range(1, what["iterations"] + 1)}
        check_free(self.out, {NOTE: lambda _: noted, ADAPTER: lambda p: noted and checkpoint.has_adapter(p), **ours})
        host = find_state(model)
        beside = {n: digest_of(Adapter(host.root, n).state_dict()) for n in around} if host else {}
        phases = {p: {k: _told(v) for k, v in o.items() if k not in ("progress", "tracking", "keep", "save_every")}
                  for p, o in what["phases"].items()}  # fmt: skip
        identity = plain({
            **what, "phases": phases, "base": base_of(model), "beside": beside, "heads": list(heads),
            "data": data.digest, "eval": None if held is None else held.digest,
            "sites": {"count": len(sites), "paths": digest(list(sites))}, "versions": versions(),
        })  # fmt: skip
        if self.resume and noted:
            goes_on(
                f"The folder {shown(self.out)}", read_sealed(self.out / NOTE).get("identity", {}), identity,
                way="Repeat the call with its options to go on with it, or start again with resume=False or in another "
                "folder (out=).",
            )  # fmt: skip
            for i in range(1, what["iterations"] + 1):
                if (self.out / _positions(i)).exists():  # and a kill came before their checkpoints went
                    checkpoint.drop(self.phase("full", i))
            return self
        drop(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        write_sealed(self.out / NOTE, {"identity": identity})
        return self

    def phase(self, phase: str, iteration: int) -> Path:
        """Return the folder of a phase's checkpoints."""
        return self.out / f"{phase}-{iteration}"

    def positions(self, iteration: int) -> dict[str, Tensor] | None:
        """Return the positions that an iteration has chosen, by path; None where it has not come to that."""
        file = self.out / _positions(iteration)
        if not file.exists():
            return None
        found = read_state(file)
        if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
            raise AddendaError(f"{shown(file)} holds no positions of such a run. Remove it, or choose another out=.")
        return found

    def keep(self, iteration: int, positions: dict[str, Tensor]) -> None:
        """Write the positions of an iteration, and let the checkpoints of its first phase go."""
        write_state(self.out / _positions(iteration), positions, "positions")
        checkpoint.drop(self.phase("full", iteration))

    def finish(self, adapter: Adapter) -> Path:
        """Write the result."""
        return save(adapter, self.out / ADAPTER)


def is_of_lottery(out: Path) -> bool:
    """Return whether a folder holds a lottery run, begun or finished."""
    try:
        return isinstance(read_sealed(out / NOTE).get("identity"), dict)
    except AddendaError:
        return False


def drop(out: Path) -> None:
    """Delete what a lottery run has left, and the folder where it is empty then; nothing where there was no run."""
    if not is_of_lottery(out):
        return
    for folder in [*out.glob("full-*"), *out.glob("sparse-*")]:
        checkpoint.drop(folder)
    for file in out.glob(_positions("*")):
        if _is_positions(file):
            file.unlink()
    if (out / ADAPTER).is_file() and checkpoint.has_adapter(out / ADAPTER):
        (out / ADAPTER).unlink()
    (out / NOTE).unlink()  # last: by it the others are known
    if not any(out.iterdir()):
        out.rmdir()


def _positions(iteration: int | str) -> str:
    return f"positions-{iteration}.safetensors"


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors by name, whatever their order."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}\x1f{tuple(t.shape)}\x1f{t.dtype}\x1e".encode())
        sha.update(t.reshape(-1).view(torch.uint8).numpy().data if t.numel() else b"")
    return sha.hexdigest()


def _told(value: Any) -> Any:
    """Return an option as it is written down: a function by its name, rows of steps by their hash."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return {"count": len(value), "sha256": digest(list(value))}
    return getattr(value, "__qualname__", type(value).__name__) if callable(value) else value


def _is_positions(path: Path) -> bool:
    try:
        return isinstance(read_state(path), dict)
    except AddendaError:
        return False
