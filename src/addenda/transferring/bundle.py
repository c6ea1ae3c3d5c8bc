"""The one file that moves with an adapter: seeds, a discriminator, and whose they are. No other input is in it.

    bundle = read_bundle("task.bundle")
    bundle.seeds, bundle.name, bundle.count              # five inputs of the task, word for word; its name; N
    bundle.check_teacher(model, tokenizer, adapter)      # the source that it was made with, or an error
    judge = bundle.attach(source_model, tokenizer)       # the discriminator, on the base that it was trained on

The file is one of safetensors: an entry of JSON, and the discriminator's own adapter file as bytes. It proves itself as
an adapter file does (`core.file.container`): one changed bit anywhere is an error. Three things are named by digest:
the base, the adapter and the tokenizer of the teacher, whose answers the next model learns; the base and the tokenizer
of the judge, which the discriminator was trained on; the chat template, by which prompts were made. In a chain of
transfers the teacher changes and the judge stays (`Bundle.under`).

The seeds are task data. Whoever has the file has them, and it says so.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from addenda.core.adapter.handle import Adapter
from addenda.core.adapter.load import place as attach_file
from addenda.core.base.errors import AddendaError
from addenda.core.base.visible import label
from addenda.core.disk.access import is_sha256, parse_json, path_of, shown
from addenda.core.disk.place import file_for
from addenda.core.file.container import DIGITS, says, sound, write
from addenda.core.file.header import read_bytes
from addenda.core.file.identity import base_of, plain
from addenda.core.file.tokenizer import mark, template_of
from addenda.core.file.trained_on import content_hash
from addenda.data.encode import use_chat
from addenda.data.examples import Chat
from addenda.transferring.discriminator import ADAPTER, Discriminator
from addenda.transferring.inputs import prompt_of
from addenda.transferring.question import Wording
from addenda.transferring.synthesise import check_seeds

FORMAT = "addenda transfer 1"
NOTICE = (
    "The seeds in this file are inputs of the task, word for word: whoever has the file has them. No other input of "
    "the task is in it."
)
_ENTRY, _BEFORE, _TENSOR = "bundle", b'{"__metadata__":{"bundle":"{\\"sha256\\":\\"', "discriminator"
_KEYS = {"sha256", "format", "notice", "name", "count", "seeds", "system", "teacher", "judge", "discriminator", "made"}
_MOST = 10**9


@dataclass(frozen=True)
class Side:
    """A model that a bundle names: its base, its tokenizer, and by what template it is asked."""

    base: Mapping[str, Any]  # see `core.file.identity.base_of`
    tokenizer: str
    entries: int
    template: str | None  # SHA-256 of the chat template; None for plain text

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any, chat: bool) -> "Side":
        found = mark(tokenizer)
        return cls(plain(base_of(model)), found.sha256, found.entries, template_of(tokenizer) if chat else None)

    def differences(self, model: nn.Module, tokenizer: Any) -> list[str]:
        """Return in words what of a model and a tokenizer is not this side's."""
        base, said = plain(base_of(model)), []
        there, here = (", ".join(b["packed"]) or "plain weights" for b in (self.base, base))
        if there != here:
            said.append(f"the base is kept in another form ({there} then, {here} here)")
        elif base["weights"] != self.base["weights"] or base["class"] != self.base["class"]:
            there, here = (f"{b['class']} in {'/'.join(b['dtypes'])}" for b in (self.base, base))
            marks = f"SHA-256 {self.base['weights'][:12]}… and {base['weights'][:12]}…"
            said.append(f"the base is another ({there} then, {here} here, {marks})")
        elif base["config"] != self.base["config"]:
            said.append("the base's configuration is another")
        elif base != self.base:
            said.append("the base's tensors are of other dtypes")
        if (found := mark(tokenizer)).sha256 != self.tokenizer:
            said.append(f"the tokenizer is another ({self.entries:,} tokens then, {found.entries:,} here)")
        elif self.template is not None and template_of(tokenizer) != self.template:
            said.append("the chat template is another")
        return said


@dataclass(frozen=True)
class Bundle:
    """What a bundle's file holds. name: of the task; count: N, how many inputs the source had; seeds: of them.

    system: the turn that every prompt stands under, or None. chat: whether prompts went through a template. adapter:
    SHA-256 of the teacher's adapter, the same on a model and in any file of it. file: the discriminator's adapter file.
    judged: how the discriminator was trained, and its accuracy on what was held out. made: options and versions.
    """

    name: str
    count: int
    seeds: tuple[str, ...]
    system: str | None
    chat: bool
    teacher: Side
    adapter: str
    judge: Side
    judged: Discriminator
    file: bytes = field(repr=False)
    made: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = field(default=None, compare=False)

    def prompt(self, text: str) -> str | Chat:
        """Return an input as a prompt of this task."""
        return prompt_of(text, self.system)

    def check_teacher(self, model: nn.Module, tokenizer: Any, adapter: Adapter) -> None:
        """Raise AddendaError where a model, tokenizer or adapter is not the source that the bundle is of."""
        wrong = self.teacher.differences(model, tokenizer)
        if (found := content_hash(adapter)) != self.adapter:
            wrong.append(f"the adapter is another (SHA-256 {self.adapter[:12]}… then, {found[:12]}… here)")
        if wrong:
            raise AddendaError(
                f"{self._named()} goes with another source: {'; '.join(wrong)}. Give the adapter that it was made for, "
                "on the base that this was trained on, in the same dtype."
            )

    def attach(self, model: nn.Module, tokenizer: Any, *, name: str = ADAPTER) -> Discriminator:
        """Put the discriminator on its base, where it does not act, and return it. name: of it, on this model.

        Raises AddendaError, with the model as it was, for another base or tokenizer, and as `load` does.
        """
        if wrong := self.judge.differences(model, tokenizer):
            raise AddendaError(
                f"The discriminator of {self._named()} was trained on another model: {'; '.join(wrong)}. Give the base "
                "that it was trained on, in the same dtype, with its tokenizer."
            )
        header, tensors = read_bytes(self.file, "its discriminator")
        attach_file(model, self.path or "the bundle", header, tensors, name=name, activate=False)
        return replace(self.judged, adapter=name)

    def under(self, model: nn.Module, tokenizer: Any, adapter: Adapter) -> "Bundle":
        """Return this bundle for the adapter that a transfer has made, the next teacher; seeds and judge are kept."""
        teacher = Side.of(model, tokenizer, use_chat(tokenizer, None))
        chat, adapted = teacher.template is not None, content_hash(adapter)
        return replace(self, teacher=teacher, adapter=adapted, chat=chat, path=None)

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all; over an older bundle only. Returns its path."""
        file = file_for(path, is_bundle, what="out")
        about = {
            "sha256": "0" * DIGITS, "format": FORMAT, "notice": NOTICE, "name": self.name, "count": self.count,
            "seeds": list(self.seeds), "system": self.system,
            "teacher": _of_side(self.teacher) | {"chat": self.chat, "adapter": self.adapter},
            "judge": _of_side(self.judge), "discriminator": _of_judged(self.judged), "made": plain(self.made),
        }  # fmt: skip
        text = json.dumps(about, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        try:
            again = replace(_bundle(parse_json(text)), file=self.file)
        except (ValueError, KeyError, TypeError, AddendaError) as error:
            raise AddendaError(f"The bundle was not saved: it could not be read again ({label(error, 300)}).") from None
        if again != replace(self, judged=replace(self.judged, adapter=ADAPTER), made=plain(self.made)):
            raise AddendaError("The bundle was not saved: something in it would be read as something else.")
        write(file, {_ENTRY: text}, {_TENSOR: torch.frombuffer(bytearray(self.file), dtype=torch.uint8)}, _BEFORE)
        return file

    def __str__(self) -> str:
        judged = self.judged
        return (
            f"bundle of {self.name}: {len(self.seeds)} seeds of {self.count:,} inputs; discriminator right on "
            f"{judged.accuracy:.1%} of {judged.held} held-out texts, {len(self.file):,} bytes. {NOTICE}"
        )

    def _named(self) -> str:
        return "The bundle" if self.path is None else shown(self.path)


def read_bundle(path: str | Path) -> Bundle:
    """Read a file that `Bundle.save` wrote. Raises AddendaError for any other file, and one that was changed."""
    place = path_of(path)
    if not place.is_file():
        raise AddendaError(f"There is no file {shown(place)}. Give the file that `addenda bundle` wrote.")
    with sound(place) as file:
        if _ENTRY not in file.metadata:
            raise ValueError("it is of another kind: a bundle of seeds and a discriminator was expected")
        if len(file.metadata) != 1 or {n: (d, len(s)) for n, (d, s) in file.forms.items()} != {
            _TENSOR: (torch.uint8, 1)
        }:
            raise ValueError("there is more or less in it than a bundle has")
        tensors, proof = file.proven(_BEFORE)
        if proof is None:
            raise ValueError("it does not carry its digest where it is expected")
        try:
            made = _bundle(parse_json(file.metadata[_ENTRY]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"what it says of itself is malformed ({type(error).__name__}: {error})") from None
        made = replace(made, file=tensors[_TENSOR].numpy().tobytes(), path=place)
    try:
        read_bytes(made.file, "it")
    except AddendaError as error:
        raise AddendaError(f"{shown(place)} holds no sound discriminator: {error}") from None
    return made


def is_bundle(path: Path) -> bool:
    """Return whether a file says that it is a bundle."""
    return says(path, _ENTRY)


def adapter_file(adapter: Adapter) -> bytes:
    """Return the bytes of an adapter's file."""
    with tempfile.TemporaryDirectory(prefix="addenda-") as folder:
        return adapter.save(Path(folder) / "discriminator.safetensors").read_bytes()


def _of_side(side: Side) -> dict[str, Any]:
    return {"base": dict(side.base), "tokenizer": side.tokenizer, "entries": side.entries, "template": side.template}


def _of_judged(judged: Discriminator) -> dict[str, Any]:
    wording = judged.wording
    return {
        "chat": wording.chat, "answers": list(wording.answers), "tokens": list(wording.tokens),
        "accuracy": judged.accuracy, "held": judged.held, "steps": judged.steps, "dropped": judged.dropped,
    }  # fmt: skip


def _bundle(about: Any) -> Bundle:
    """Return what a file says, without its discriminator's bytes. Raises ValueError for what `save` does not write."""
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        said = about.get("format") if isinstance(about, dict) else about
        raise ValueError(f"its format is {label(said)}, {FORMAT!r} was expected")
    if set(about) != _KEYS or about["notice"] != NOTICE:
        raise ValueError(f"its entries are {label(sorted(about))}")
    name, seeds, system, made = about["name"], about["seeds"], about["system"], about["made"]
    if not (isinstance(name, str) and name.strip() == name and len(name.splitlines()) == 1):
        raise ValueError("the name of the task is one line of text")
    if not isinstance(seeds, list) or not (system is None or isinstance(system, str)) or not isinstance(made, dict):
        raise ValueError("its seeds are a list, its system turn a text or none, and how it was made an object")
    try:
        if check_seeds(seeds) != seeds:
            raise ValueError("its seeds have space around them")
    except AddendaError as error:
        raise ValueError(str(error)) from None
    teacher, judge, judged = about["teacher"], about["judge"], about["discriminator"]
    if not (isinstance(teacher, dict) and is_sha256(teacher.get("adapter")) and type(teacher.get("chat")) is bool):
        raise ValueError("it does not say which adapter it goes with")
    rest = {k: v for k, v in teacher.items() if k not in ("adapter", "chat")}
    return Bundle(
        name, _count(about["count"], 1), tuple(seeds), system, teacher["chat"], _side(rest), teacher["adapter"],
        _side(judge), _judged(judged, name), b"", made,
    )  # fmt: skip


def _side(said: Any) -> Side:
    if not isinstance(said, dict) or set(said) != {"base", "tokenizer", "entries", "template"}:
        raise ValueError("a model is named by its base, its tokenizer and its template")
    base, template = said["base"], said["template"]
    if not isinstance(base, dict) or set(base) != {"class", "dtypes", "packed", "config", "weights"}:
        raise ValueError("a base is named by class, dtypes, form, configuration and weights")
    if not (is_sha256(base["weights"]) and is_sha256(base["config"]) and is_sha256(said["tokenizer"])):
        raise ValueError("weights, configuration and tokenizer are named by SHA-256")
    if not (isinstance(base["class"], str) and isinstance(base["dtypes"], dict) and isinstance(base["packed"], list)):
        raise ValueError("a base is named by class, dtypes, form, configuration and weights")
    if template is not None and not is_sha256(template):
        raise ValueError("a chat template is named by SHA-256")
    return Side(base, said["tokenizer"], _count(said["entries"], 1), template)


def _judged(said: Any, name: str) -> Discriminator:
    if not isinstance(said, dict) or set(said) != {"chat", "answers", "tokens", "accuracy", "held", "steps", "dropped"}:
        raise ValueError("it does not say how its discriminator was made")
    answers, tokens, accuracy = said["answers"], said["tokens"], said["accuracy"]
    if not (isinstance(answers, list) and len(answers) == 2 and all(isinstance(a, str) and a.strip() for a in answers)):
        raise ValueError("a discriminator answers by two words")
    if not isinstance(tokens, list) or len(tokens) != 2 or len({_count(t) for t in tokens}) != 2:
        raise ValueError("a discriminator answers by two tokens")
    if type(said["chat"]) is not bool or type(accuracy) not in (int, float) or not 0 <= accuracy <= 1:
        raise ValueError("an accuracy is from 0 to 1, and a template there or not")
    wording = Wording(name, said["chat"], (answers[0], answers[1]), (tokens[0], tokens[1]))
    return Discriminator(
        wording, ADAPTER, float(accuracy), _count(said["held"]), _count(said["steps"]), _count(said["dropped"])
    )


def _count(said: Any, least: int = 0) -> int:
    if type(said) is not int or not least <= said <= _MOST:
        raise ValueError(f"a number of things is whole and at least {least}, got {label(said, 40)}")
    return said
