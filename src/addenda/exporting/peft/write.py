"""Writing an adapter as a folder of PEFT."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method
from addenda.core.modules.borrow import training_mode
from addenda.core.site.site import Site
from addenda.core.state.state import record_of
from addenda.exporting.deltas import changed_sites
from addenda.exporting.pairs import Pair
from addenda.exporting.peft.conversion import Conversion, Live, Written
from addenda.exporting.peft.folder import PREFIX, ROOT, write_folder
from addenda.exporting.peft.lora import written
from addenda.exporting.peft.table import CONVERSIONS
from addenda.exporting.routes import Route

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def conversion_for(method: Method, site: Site) -> tuple[Conversion | None, Route]:
    """Return the conversion that writes a method at a site, and how; None where it goes as a LoRA with an error."""
    for conversion in CONVERSIONS.values():
        route = conversion.route(method, site)
        if route is not None:
            return (None if route.kind == "approximate" else conversion), route
    return None, Route("approximate", "LORA of the rank or energy asked for")


@torch.no_grad()
def write(adapter: Adapter, folder: Path, pairs: dict[str, Pair] | None = None) -> None:
    """Write an adapter into an empty folder that is there. pairs: write these as LORA instead of its own methods.

    Raises AddendaError for sites that no one config of PEFT says, with the reasons, and for trained copies of single
    parameters that PEFT has no place for; nothing is written then.
    """
    root, _, record = record_of(adapter.model, adapter.name)
    made = _own(adapter) if pairs is None else written({k: (p.site, p.B, p.A, 1.0) for k, p in pairs.items()})
    config, tensors = made.config, {f"{PREFIX}{k}": t for k, t in made.tensors.items()}
    tensors |= {f"{ROOT}{k}": t for k, t in made.shared.items()}
    paths = [*pairs] if pairs is not None else [p for p in record.methods if p not in record.also_train]
    heads, copies = _heads(adapter, root)
    if heads:
        config["modules_to_save"] = heads
        tensors |= {f"{PREFIX}{k}": t for k, t in copies.items()}
    config = {**_common(root), "target_modules": targets(root, paths), **config}
    write_folder(folder, config, tensors)


def _own(adapter: Adapter) -> Written:
    """Return what the conversion of the adapter's methods writes."""
    with training_mode(adapter.model, False):
        live = [Live(site, tensors) for site, tensors in changed_sites(adapter)]
        used: dict[Any, list[Live]] = {}
        refused = []
        for each in live:
            conversion, route = conversion_for(each.method, each.site)
            if conversion is None or route.kind == "refused":
                refused.append(f"{each.path} ({each.method.name}): {route.why}")
            used.setdefault(conversion, []).append(each)
        if refused:
            raise AddendaError(f"{len(refused)} sites have no form in PEFT: {'; '.join(refused[:6])}.")
        if len(used) > 1:
            kinds = ", ".join(c.type for c in used)
            raise AddendaError(
                f"{adapter.name!r} has sites of {len(used)} types of PEFT ({kinds}), and a folder has one. Give rank= "
                "or energy= for a LoRA of all of them, or export to 'merged'."
            )
        ((conversion, sites),) = used.items()
        return conversion.write(sites)


def _common(root: nn.Module) -> dict[str, Any]:
    """Return the keys that every config has. Without a path of this machine: a folder's name is no address."""
    kind = type(root).__mro__
    names = [c.__name__ for c in kind]
    task = next((task for end, task in _TASKS.items() if any(n.endswith(end) for n in names)), None)
    source = getattr(getattr(root, "config", None), "_name_or_path", "") or ""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": None if Path(source).is_absolute() else source or None,
        "inference_mode": True,
        "peft_version": "0.21.2",  # the version whose format this is
        "revision": None,
        "task_type": task,
    }


def targets(root: nn.Module, paths: list[str]) -> list[str] | str:
    """Return target_modules: whole paths, or one expression where a path ends another module's path too."""
    others = [n for n, _ in root.named_modules() if n and n not in set(paths)]
    if any(o.endswith(f".{p}") for p in paths for o in others):
        return "|".join(re.escape(p) for p in sorted(paths))
    return sorted(paths)


def _heads(adapter: Adapter, root: nn.Module) -> tuple[list[str], dict[str, Tensor]]:
    """Return the names for modules_to_save, and every tensor of those modules by path."""
    record = record_of(adapter.model, adapter.name).record
    modules = dict.fromkeys(path.rpartition(".")[0] for path in record.also_train)
    copies: dict[str, Tensor] = {}
    trained = {path: t.tensors()["value"] for path, t in adapter.sites() if path in record.also_train}
    for module in modules:
        if not module:
            raise AddendaError("A trained parameter of the model itself has no place in PEFT; use 'merged'.")
        for name, p in root.get_submodule(module).named_parameters():
            if not name.startswith("addenda."):
                copies[f"{module}.{name}"] = trained.get(f"{module}.{name}", p.detach())
    return [*modules], copies
