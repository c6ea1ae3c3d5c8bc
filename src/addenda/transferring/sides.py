"""The models of a transfer, checked before anything is made: source with its adapter, judge, target.

The source is the bundle's own: its base, adapter and tokenizer are compared by hash. The judge is the base that the
bundle's discriminator was trained on: the source, or in a chain of transfers the model that the chain began with.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from addenda.core.adapter.attach import detach
from addenda.core.adapter.blocks import disabled
from addenda.core.adapter.handle import Adapter, adapters
from addenda.core.adapter.load import load
from addenda.core.adapter.switch import switch
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of, shown
from addenda.core.file.trained_on import content_hash
from addenda.core.state.state import find_state, free_name, names_on
from addenda.models.load import dtype_for, load_model, wanted_by
from addenda.models.machine import DTYPES
from addenda.quantizing.quantize import FORMS
from addenda.train.generate import check_writes
from addenda.transferring.bundle import Bundle, is_bundle
from addenda.transferring.discriminator import ADAPTER, Discriminator

Given = str | Path | tuple[Any, Any]  # a folder, or a loaded model and its tokenizer
_MOST = 64  # files beside a bundle that are looked at


@dataclass(frozen=True)
class Opened:
    """A model and its tokenizer. source: where it is from, for reports."""

    model: Any
    tokenizer: Any
    source: str


@dataclass(frozen=True)
class Sides:
    """The models of one transfer. adapter: the teacher's, on the source; judge_name: of the discriminator there."""

    source: Opened
    judge: Opened
    target: Opened
    adapter: Adapter
    discriminator: Discriminator

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """Let the teacher's adapter act alone, in a `with` block."""
        host = find_state(self.source.model)
        assert host is not None
        acted = host.state.active
        switch(self.source.model, self.adapter.name)
        try:
            yield
        finally:
            switch(self.source.model, acted)

    def bare(self) -> Any:
        """Let the target's base act alone, in a `with` block."""
        return disabled(self.target.model) if find_state(self.target.model) else nullcontext()


def check_apart(source: Given, target: Given) -> None:
    """Raise AddendaError where source and target are one: a folder, or one model in memory."""
    if isinstance(source, tuple) and isinstance(target, tuple):
        same = source[0] is target[0]
    else:
        given = ((source, "source"), (target, "target"))
        folders = [path_of(g, what).resolve() for g, what in given if isinstance(g, str | Path)]
        same = len(folders) == 2 and folders[0] == folders[1]
    if same:
        raise AddendaError(
            "Source and target are the same model, and its adapter is on it already. Name the folder of another one as "
            "the target."
        )


@contextmanager
def opened(
    bundle: Bundle,
    source: Given,
    target: Given,
    *,
    adapter: Any = None,
    judge_model: Given | None = None,
    dtype: Any = "auto",
    device: Any = None,
    trust_remote_code: bool = False,
) -> Iterator[Sides]:
    """Yield the models of a transfer, in a `with` block, with the bundle's adapter and discriminator on them.

    adapter: a file, an adapter on a loaded source or its name there; None: the file beside the bundle that is the
    bundle's by hash. At the end what was attached to loaded models comes off again; the target is not touched here.
    Raises AddendaError for a source, an adapter or a judge that are not the bundle's, and models that cannot write.
    """
    ways = {"device": device, "trust_remote_code": trust_remote_code, "task": "causal"}
    named = _as_named(bundle.teacher.base)
    if isinstance(adapter, str | Path) and (file := path_of(adapter, "adapter")).is_file():
        named |= {k: v for k, v in wanted_by(file).items() if k == "quantize"}
        named["dtype"] = dtype_for([file], named["dtype"])
    first = _loaded(source, "source", ways | named)
    came: list[tuple[nn.Module, str]] = []
    try:
        teacher = _teacher(bundle, first, adapter, came)
        judge = first
        if judge_model is not None:
            judge = _loaded(judge_model, "judge_model", ways | _as_named(bundle.judge.base))
        elif wrong := bundle.judge.differences(first.model, first.tokenizer):
            raise AddendaError(
                f"The discriminator of {_named(bundle)} was trained on another model than this source "
                f"({'; '.join(wrong)}): the bundle has been through a "
                "transfer. Give that first model too: judge_model=."
            )
        free = free_name(judge.model, ADAPTER)
        discriminator = bundle.attach(judge.model, judge.tokenizer, name=free)
        came.append((judge.model, free))
        last = _loaded(target, "target", ways | {"dtype": dtype})
        check_writes(last.model)
        yield Sides(first, judge, last, teacher, discriminator)
    finally:
        for model, name in came:
            if name in names_on(model):
                detach(model, name)


def _as_named(base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options to load a folder with in the dtype and form of weights of a base that a bundle names."""
    dtypes = [d for d in base["dtypes"] if d in DTYPES]
    form = next((form for form, cls in FORMS.items() if base["packed"] == [cls.__name__]), None)
    return {"dtype": dtypes[0] if len(base["dtypes"]) == len(dtypes) == 1 else "auto", "quantize": form}


def _loaded(given: Given, what: str, ways: dict[str, Any]) -> Opened:
    if isinstance(given, tuple):
        if len(given) != 2 or not isinstance(given[0], nn.Module):
            raise AddendaError(f"{what}= is a folder, or a loaded model and its tokenizer: (model, tokenizer).")
        check_writes(given[0])
        return Opened(*given, getattr(given[0], "name_or_path", "") or type(given[0]).__name__)
    folder = path_of(given, what)
    made = load_model(folder, **ways)
    return Opened(made.model, made.tokenizer, str(folder))


def put_on(model: nn.Module, tokenizer: Any, adapter: str | Path | Adapter) -> tuple[Adapter, bool]:
    """Return an adapter on a model, and whether it was put there just now and has to come off again.

    adapter: itself, its name on the model, or its file. Raises AddendaError for what is none of these, and as `load`.
    """
    there = names_on(model)
    if isinstance(adapter, Adapter):
        host = find_state(model)
        if host is None or adapter.model is not host.root or adapter.name not in there:
            raise AddendaError(f"The adapter {adapter.name!r} is not on this model. Load its file here.")
        return adapters(model)[adapter.name], False
    if isinstance(adapter, str) and adapter in there:
        return adapters(model)[adapter], False
    file = path_of(adapter, "adapter")
    if not file.is_file():
        known = f" On the model: {', '.join(map(repr, there))}." if there else ""
        raise AddendaError(f"{shown(file)} is no file, and no adapter on this model is called so.{known}")
    return load(model, file, name=free_name(model, "source"), activate=False, tokenizer=tokenizer), True


def _teacher(bundle: Bundle, side: Opened, adapter: Any, came: list) -> Adapter:
    """Return the bundle's adapter on the source; one that is put there is noted in `came`."""
    if wrong := bundle.teacher.differences(side.model, side.tokenizer):
        raise AddendaError(f"{_named(bundle)} goes with another source: {'; '.join(wrong)}. Name its folder: source=.")
    if adapter is not None:
        found, new = put_on(side.model, side.tokenizer, adapter)
        if new:
            came.append((side.model, found.name))
        bundle.check_teacher(side.model, side.tokenizer, found)
        return found
    if bundle.path is None:
        raise AddendaError("A bundle in memory has no folder in which its adapter could lie: give adapter=.")
    name = free_name(side.model, "source")
    candidates = [p for p in sorted(bundle.path.parent.glob("*.safetensors"))[:_MOST] if not is_bundle(p)]
    for path in candidates:
        try:
            found = load(side.model, path, name=name, activate=False)
        except AddendaError:  # of another model, or no adapter at all
            continue
        if content_hash(found) == bundle.adapter:
            came.append((side.model, name))
            return found
        detach(side.model, name)
    raise AddendaError(
        f"None of the {len(candidates)} safetensors files beside {shown(bundle.path)} is the adapter that it was made "
        f"with (SHA-256 of its tensors {bundle.adapter[:12]}…). Name its file: adapter=."
    )


def _named(bundle: Bundle) -> str:
    return "The bundle" if bundle.path is None else shown(bundle.path)
