"""Importing an adapter that another program has trained: PEFT, llama.cpp's GGUF, kohya's and LyCORIS's files."""

from pathlib import Path

from torch import nn

from addenda.core.adapter.attach import ready
from addenda.core.adapter.grow import refuse_untold
from addenda.core.adapter.handle import Adapter
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import shown
from addenda.core.modules.borrow import in_its_mode
from addenda.exporting.doors import DOORS
from addenda.exporting.formats import format_of
from addenda.exporting.install import install
from addenda.exporting.peft.folder import PREFIX, read_folder
from addenda.models.load import HEADS


@checked()
@in_its_mode
def import_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    name: str = "default",
    trainable: bool = False,
    activate: bool = True,
    part: str | None = None,
) -> Adapter:
    """Attach an adapter that another program has written: whole, or not at all.

    path: a folder of PEFT, a GGUF adapter, or a safetensors file of kohya or LyCORIS. Only safetensors and GGUF are
    read, never a pickle. Save it (`adapter.save`) and it is an adapter of this library, with a fingerprint of the base
    that it is on; what it was trained on, no other format says. part: of a file of kohya that changes several models,
    the one that this is ("lora_unet", "lora_te1", …).

    Raises AddendaError that lists everything which does not fit the model, for options that have no counterpart here,
    and for a file of our own, which `load` takes.
    """
    root, _ = ready(model, name)
    kind = format_of(path)
    if kind == "addenda":
        raise AddendaError(f"{shown(path)} is an adapter of addenda itself: addenda.load(model, {str(path)!r}).")
    if part is not None and kind != "kohya":
        raise AddendaError(f"part= is for files of kohya, and {shown(path)} is an adapter of {kind}; leave it out.")
    refuse_untold(root)
    options = {} if part is None else {"part": part}
    forms = DOORS[kind].read(Path(path).expanduser(), root, **options)
    return install(
        root, forms.sites, name=name, heads=forms.heads, pools=forms.pools, trainable=trainable, activate=activate,
        what=f"The {kind} adapter {Path(path).name}",
    )  # fmt: skip


def outputs_in(path: str | Path) -> int | None:
    """Return how many outputs the classifier has that an adapter of PEFT carries; None where it carries none."""
    if format_of(path) != "peft":
        return None
    folder = read_folder(path)
    heads = [
        len(t) for key, t in folder.tensors.items() if t.dim() == 2 and key.removeprefix(PREFIX).split(".")[0] in HEADS
    ]
    return heads[-1] if heads and folder.config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else None
