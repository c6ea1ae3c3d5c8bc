"""The folder that an unfinished compression leaves beside its target (`train.unfinished`), and its pieces.

OUT.unfinished/
  plan.json            settings of the pieces, identities of source and text, what was judged and weighed
  piece-000.safetensors  one block: nested factors of its layers, their errors
"""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from addenda.core.disk.access import writing
from addenda.core.file import container
from addenda.reducing.solve import LowRank
from addenda.train.unfinished import Unfinished

_BEFORE_DIGEST = b'{"__metadata__":{"about":"{\\"sha256\\": \\"'  # how a piece begins


class Work(Unfinished):
    """The pieces of one compression."""

    def write(self, name: str, solved: dict[str, LowRank], uses: dict[str, float]) -> None:
        """Write the factors of one piece, in float32; errors and means in float64."""
        tensors: dict[str, Tensor] = {}
        for path, low in solved.items():
            tensors |= {f"{path}/B": low.B.float(), f"{path}/A": low.A.float(), f"{path}/errors": low.errors}
            if low.mean is not None:
                tensors[f"{path}/mean"] = low.mean
        about = {p: {"uses": uses[p], "note": low.note} for p, low in solved.items()}
        about = json.dumps({"sha256": "0" * container.DIGITS, "layers": about})
        with writing(self.folder):
            container.write(self.folder / f"{name}.safetensors", {"about": about}, tensors, _BEFORE_DIGEST)

    def has(self, name: str) -> bool:
        """Return whether a piece is there and whole, by its digest. One that the disk has damaged counts as absent."""
        try:
            with container.opened(self.folder / f"{name}.safetensors") as file:
                return file.proven(_BEFORE_DIGEST)[1] is not None
        except (OSError, ValueError, RecursionError):
            return False

    def about(self, name: str) -> dict[str, dict]:
        """Read {path: uses, note and errors} of one piece."""
        with safe_open(self.folder / f"{name}.safetensors", framework="pt") as f:
            about = json.loads(f.metadata()["about"])["layers"]
            return {p: a | {"errors": f.get_tensor(f"{p}/errors").numpy()} for p, a in about.items()}

    def read(self, name: str, path: str, rank: int) -> LowRank:
        """Read one layer's factors of a rank, and no others."""
        with safe_open(self.folder / f"{name}.safetensors", framework="pt") as f:
            B, A = f.get_slice(f"{path}/B")[:, :rank], f.get_slice(f"{path}/A")[:rank]
            mean = f.get_tensor(f"{path}/mean") if f"{path}/mean" in f.keys() else None  # noqa: SIM118
            return LowRank(B.double(), A.double(), f.get_tensor(f"{path}/errors"), mean)

    def pieces(self) -> Iterable[Path]:
        """Return the pieces among the files in the folder."""
        return [path for path in self.folder.glob("*.safetensors") if _is_piece(path)]


def _is_piece(path: Path) -> bool:
    """Return whether a file is a piece of such a run, by its header alone: it may be large, and is not read."""
    try:
        with container.opened(path) as file:
            return "about" in file.metadata
    except (OSError, ValueError, RecursionError):
        return False
