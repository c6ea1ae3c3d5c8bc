"""A warm start: a new run whose adapter begins with the values of a file, and not as its method begins.

Methods, options, places and heads are the file's, and so is the seed of its random tensors. Everything else is new:
the optimizer, the schedule of the rate, and the step that the method's own schedules count by. It is no resume: the
file's SHA-256 is part of what the run is, and the file may be of any run, a checkpoint's too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from addenda.core.adapter.assign import assign
from addenda.core.adapter.handle import Adapter
from addenda.core.adapter.load import check_tokenizer, place
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of, reading, sha256_of, shown
from addenda.core.file.header import Header, read
from addenda.core.file.methods import methods_of
from addenda.core.method.contract import Method
from addenda.models.machine import DTYPES


@dataclass(frozen=True)
class Start:
    """An adapter file that a run begins with, read and checked for form."""

    path: Path
    sha256: str  # of the file
    header: Header
    tensors: dict[str, Tensor]
    methods: tuple[Method, ...]

    @property
    def method(self) -> Any:
        """Its method; of several, the tuple of them."""
        return self.methods[0] if len(self.methods) == 1 else self.methods

    @property
    def dtype(self) -> str:
        """The dtype of the base that it was trained on, "auto" where no folder can be loaded in that."""
        kinds = {s.dtype for s in self.header.sites if not s.is_head}
        return kinds.pop() if len(kinds) == 1 and kinds <= set(DTYPES) else "auto"

    @property
    def heads(self) -> list[str]:
        """The paths of the heads that are trained as whole copies."""
        return [s.path for s in self.header.heads]


def read_start(given: str | Path, method: Any, out: Path | None) -> Start:
    """Read the file that a run is to begin with. method: the one asked for, None for the file's; out: the run's folder.

    Raises AddendaError for a file that is none, in codes, of other methods or options, or one that the run would write.
    """
    path = path_of(given, "start")
    if out is not None:
        with reading(path):
            place, own = path.resolve(), out.resolve()
        if place == own / "adapter.safetensors" or (own / "checkpoints") in place.parents:
            raise AddendaError(
                f"start={shown(path)} is a file of this very run, which will write it anew. Choose another --out; to "
                "go on with an interrupted run, leave start= out."
            )
    header, tensors = read(path)
    if header.has_codes:
        raise AddendaError(
            f"{shown(path)} holds its matrices as codes, and these cannot be moved a little. Begin with a checkpoint "
            "of its run, or with a file that was saved with latent=True."
        )
    methods = tuple(methods_of(header, path)[0])
    asked = [*method.values()] if isinstance(method, Mapping) else [] if method is None else [method]
    if asked and set(asked) != set(methods):
        raise AddendaError(
            f"{shown(path)} is an adapter of {_all(methods)}, and method= says {_all(asked)}. Leave method= out, which "
            "takes the file's, or give the same options."
        )
    return Start(path, sha256_of(path), header, tensors, methods)


def attach_start(
    start: Start,
    model: nn.Module,
    *,
    method: Any,
    targets: Any,
    exclude: Iterable[Any],
    also_train: Any,
    head_bits: int | None,
    labels: tuple[str, ...],
    tokenizer: Any,
    name: str,
) -> Adapter:
    """Attach the adapter of a start, ready to train, its schedules at step 0. The start's tensors become its own.

    The options are those of `tune`, and must agree with the file where they are given. Raises AddendaError where they
    do not, and whatever `load` raises: other places, other base weights, another tokenizer.
    """
    problems = _other_places(start, model, method, targets, tuple(exclude), also_train)
    if head_bits is not None and start.header.head.get("bits") != head_bits:
        problems.append(f"head_bits={head_bits} is not that of its heads, {start.header.head.get('bits')}")
    if start.header.labels and labels and start.header.labels != labels:
        problems.append(f"its labels are {_some(start.header.labels)}, and those of the data are {_some(labels)}")
    kinds = {s.dtype for s in start.header.sites if not s.is_head}
    here = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    if not kinds & here:
        problems.append(f"its base was in {' and '.join(sorted(kinds))}, this one is in {' and '.join(sorted(here))} "
                        "(give dtype=)")  # fmt: skip
    if problems:
        raise AddendaError(f"The run cannot begin with {shown(start.path)}: {'; '.join(problems)}.")
    check_tokenizer(start.header, tokenizer, start.path)
    adapter = place(model, start.path, start.header, start.tensors, name=name, trainable=True)
    adapter.draw(0)
    adapter.begin()  # of this run: steps of the file's are none of it
    return adapter


def _other_places(start: Start, model: nn.Module, method: Any, targets: Any, exclude: tuple, also_train: Any) -> list:
    """Return where the places that a call asks for are not the file's."""
    asks = isinstance(method, Mapping) or targets is not None or bool(exclude)
    named = also_train != "auto"
    if not (asks or named):
        return []
    if method is None and len(start.methods) != 1:
        return [f"it has several methods ({_all(start.methods)}), so leave targets=, exclude= and also_train= out"]
    heads = set(start.heads)
    chosen = start.methods[0] if method is None else method
    plan, copied = assign(model, chosen, targets, exclude, also_train if named else ())
    problems = []
    if named and set(copied) != heads:
        problems.append(f"its heads are {_some(sorted(heads))}, and also_train= names {_some(sorted(copied))}")
    there = {s.path: start.methods[s.method] for s in start.header.sites if not s.is_head}
    now = {site.path: m for site, m in plan if site.path not in heads | set(copied)}
    other = [p for p in dict.fromkeys([*there, *now]) if there.get(p) != now.get(p)]
    if asks and other:
        problems.append(f"it is on {len(there)} places and the call names {len(now)}; {len(other)} differ, e.g. "
                        f"{_some(other)}")  # fmt: skip
    return problems


def _all(methods: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(map(str, methods))) or "none"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return (", ".join(listed[:4]) or "none") + (", …" if len(listed) > 4 else "")
