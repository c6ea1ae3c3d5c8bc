"""A model run block by block over fixed batches, so that only one block's statistics are held at a time.

The model's own forward runs for every block, so masks, rotary tables and arguments are its own; but the blocks that are
done are replaced by stubs that return what the last of them has put out, and the run ends behind the block that is
looked at. So each block is computed once a walk, or twice where it changes on the way. Models without a list of blocks
that are called once each, one after the other, are run as one piece.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.modules.borrow import training_mode
from addenda.reducing.moments import Moments

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Piece:
    """The sites that are looked at together: those of one block, or all that lie outside of blocks (block: None)."""

    name: str
    paths: tuple[str, ...]
    block: nn.Module | None = None


class _End(Exception):  # noqa: N818  a way out, no error
    """Raised when the block that was wanted is through, to end the forward."""

    def __init__(self, output: Any):
        self.output = output


class Walk:
    """Runs a model piece by piece: `for piece in walk.pieces: walk.moments(piece); …; walk.pass_by(piece)`."""

    def __init__(self, model: nn.Module, batches: list[Batch], paths: list[str]):
        self.model, self.batches = model, batches
        self.device = next(p.device for p in model.parameters())
        self.done: list[nn.Module] = []  # blocks whose outputs are known
        self.outputs: list[Any] = []  # of the last of them, one for each batch
        self.pieces = self._pieces(paths)

    def _pieces(self, paths: list[str]) -> list[Piece]:
        listed = [(p, m) for p, m in self.model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
        outer = [(p, m) for p, m in listed if not any(p.startswith(f"{q}.") for q, _ in listed)]
        holding = [(p, m) for p, m in outer if any(path.startswith(f"{p}.") for path in paths)]
        if len(holding) != 1 or not self._once_each(holding[0][1]):
            return [Piece("the whole model", tuple(paths))]
        at, blocks = holding[0]
        pieces = [
            Piece(f"{at}.{i}", tuple(p for p in paths if p.startswith(f"{at}.{i}.")), b) for i, b in enumerate(blocks)
        ]
        loose = tuple(p for p in paths if not p.startswith(f"{at}."))
        if loose:
            return [*pieces, Piece("outside of the blocks", loose)]
        return pieces[: 1 + max(i for i, p in enumerate(pieces) if p.paths)]

    def _once_each(self, blocks: nn.ModuleList) -> bool:
        """Return whether one forward calls every block once, in order."""
        order: list[int] = []
        with ExitStack() as hooks:
            for i, block in enumerate(blocks):
                handle = block.register_forward_pre_hook(lambda *_, i=i: order.append(i))
                hooks.callback(handle.remove)
            self._run({k: v[:1] for k, v in self.batches[0].items()})
        return order == list(range(len(blocks)))

    @torch.no_grad()
    def _run(self, batch: Batch) -> Any:
        parameters = inspect.signature(type(self.model).forward).parameters
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        with training_mode(self.model, False):
            return self.model(**{k: v.to(self.device) for k, v in batch.items()}, **options)

    @contextmanager
    def _resumed(self, i: int) -> Iterator[None]:
        """Let the blocks that are done return what is known for batch i, inside a `with` block."""
        forwards = [b.__dict__.get("forward") for b in self.done]
        for b in self.done:
            b.__dict__["forward"] = lambda *args, **kwargs: self.outputs[i]
        try:
            yield
        finally:
            for b, forward in zip(self.done, forwards, strict=True):
                del b.__dict__["forward"]
                if forward is not None:
                    b.__dict__["forward"] = forward

    def _up_to(self, block: nn.Module | None, i: int) -> Any:
        """Run batch i through the model to the end of the block; return its output."""

        def end(module: nn.Module, args: tuple, output: Any) -> None:
            raise _End(output)

        handle = None if block is None else block.register_forward_hook(end)
        try:
            with self._resumed(i):
                self._run(self.batches[i])
        except _End as reached:
            return reached.output
        finally:
            if handle is not None:
                handle.remove()
        return None

    def moments(self, piece: Piece, *, go_on: bool = True) -> tuple[dict[str, Moments], dict[str, float]]:
        """Return (moments of each site's input, one object for sites with one input; rows seen for each token).

        go_on: what the block puts out is kept, as `pass_by` would.
        """
        watch = Watch({p: self.model.get_submodule(p) for p in piece.paths})
        outputs = []
        with watch:
            for i, batch in enumerate(self.batches):
                watch.begin(batch["attention_mask"], i)
                outputs.append(self._up_to(piece.block, i))
        if go_on and piece.block is not None:
            self._step(piece.block, outputs)
        tokens = sum(int(b["attention_mask"].sum()) for b in self.batches)
        return watch.moments, {p: watch.rows[p] / tokens for p in piece.paths}

    def pass_by(self, piece: Piece) -> None:
        """Run a block for its outputs alone."""
        if piece.block is not None:
            self._step(piece.block, [self._up_to(piece.block, i) for i in range(len(self.batches))])

    def _step(self, block: nn.Module, outputs: list[Any]) -> None:
        self.done.append(block)
        self.outputs = outputs


class Watch:
    """Hooks that add up the inputs of linear layers: one sum for every distinct input, padding left out.

    Layers that are given the same tensor in the same batch share a sum: q, k and v; gate and up.
    """

    def __init__(self, modules: dict[str, nn.Module]):
        self.modules = modules
        self.moments: dict[str, Moments] = {}
        self.rows = dict.fromkeys(modules, 0)
        self._owner: dict[str, str] = {}  # path -> the path whose sum it shares
        self._seen: list[tuple[Tensor, int, str]] = []  # this batch's inputs, their version, who had them first
        self._mask: Tensor = torch.ones(1)
        self._batch = 0
        self._hooks: list = []

    def __enter__(self) -> "Watch":
        self._hooks = [
            m.register_forward_pre_hook(self._take(path), with_kwargs=True) for path, m in self.modules.items()
        ]
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()
        self._seen = []

    def begin(self, mask: Tensor, batch: int) -> None:
        """Begin a new batch, with 1 in its mask where a token is (rows × length)."""
        self._seen, self._mask, self._batch = [], mask, batch

    def _take(self, path: str) -> Callable:
        def take(module: nn.Module, given: tuple, named: dict) -> None:
            x = given[0] if given else next(iter(named.values()))
            rows = unpadded(x, self._mask)
            self.rows[path] += len(rows)
            owner = next((o for t, version, o in self._seen if t is x and t._version == version), path)
            known_owner = self._owner.setdefault(path, owner)
            if owner == path:
                self._seen.append((x, x._version, path))
            if known_owner != owner:
                raise AddendaError(
                    f"{path} shared its input with {known_owner} in one batch and with {owner} in another (batch "
                    f"{self._batch}). Leave one of them out with exclude=."
                )
            if owner != path:
                self.moments[path] = self.moments[owner]
                return
            if not bool(torch.isfinite(rows).all()):
                raise AddendaError(
                    f"{path} gets inputs that are not finite, in calibration batch {self._batch}. Run the model in "
                    "float32, or leave out the text that does it; a layer before this one overflows."
                )
            if path not in self.moments:
                self.moments[path] = Moments(x.shape[-1], x.device)
            self.moments[path].add(rows)

        return take


def unpadded(x: Tensor, mask: Tensor) -> Tensor:
    """Return the rows (tokens × n) of an input that belong to tokens, where its leading dimensions are the mask's."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if x.shape[:-1] == mask.shape or (x.dim() == 2 and len(x) == mask.numel()):
        return rows if bool(mask.all()) else rows[mask.flatten().bool().to(rows.device)]
    return rows  # rows that were picked on the way, such as an expert's: which of them are padding is not known
