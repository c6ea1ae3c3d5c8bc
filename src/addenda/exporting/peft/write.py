"""Writing an adapter as a folder of PEFT."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.modules.borrow import training_mode
from addenda.core.site.site import is_norm, owners_of, site_at
from addenda.core.state.state import record_of
from addenda.exporting.deltas import changed_sites
from addenda.exporting.pairs import Pair
from addenda.exporting.peft import copies, layout, tokens
from addenda.exporting.peft.conversion import Conversion, Live, Written, refuse
from addenda.exporting.peft.folder import PREFIX, ROOT, write_folder
from addenda.exporting.peft.lora import Piece, written
from addenda.exporting.peft.table import CONVERSIONS, conversion_for

NORMS, TOKENS = CONVERSIONS["LN_TUNING"], CONVERSIONS["TRAINABLE_TOKENS"]  # what stands beside other types

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
_HEADS = {  # what PEFT copies and saves for a task without being asked
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@torch.no_grad()
def write(adapter: Adapter, folder: Path, pairs: dict[str, Pair] | None = None) -> None:
    """Write an adapter into an empty folder that is there. pairs: write these as LORA instead of its own methods.

    Raises AddendaError for sites that no one config of PEFT says, with the reasons, and for trained copies of single
    parameters that PEFT has no place for; nothing is written then.
    """
    root, _, record = record_of(adapter.model, adapter.name)
    owners = owners_of(root)
    values = {copies.parameter_path(site_at(root, path, owners)): t.tensors()["value"].detach()
              for path, t in adapter.sites() if path in record.also_train}  # fmt: skip
    if pairs is None:
        with training_mode(adapter.model, False):
            live = [Live(site, t, layout.places(site, owners)) for site, t in changed_sites(adapter, hidden=True)]
            made = _own(adapter, live, values, getattr(root, "config", None))
    else:
        made = written({k: Piece(p.site, p.B, p.A, 1.0, layout.places(p.site, owners)) for k, p in pairs.items()})
    _refuse_barred(made, getattr(root, "config", None))
    common = _common(root)
    modules = made.modules or []
    heads = [n for n, _ in root.named_children() if n in _HEADS.get(common["task_type"], ())]
    if any(m in heads or m.split(".")[0] in heads for m in modules):
        common["task_type"], heads = None, []  # for its task PEFT would copy what is changed here
    copies.add(made, root, values, heads)
    config = {**common, "target_modules": modules if isinstance(modules, str) else targets(root, modules)}
    tensors = {f"{PREFIX}{k}": t for k, t in made.tensors.items()} | {f"{ROOT}{k}": t for k, t in made.shared.items()}
    write_folder(folder, {**config, **made.config}, tensors)


def _own(adapter: Adapter, live: list[Live], values: dict[str, Tensor], config: object) -> Written:
    """Return what the conversions of the adapter's methods write, and put the copies among them into `values`."""
    used: dict[Conversion, list[Live]] = {}
    refused = []
    for each in live:
        conversion, route = conversion_for(each.method, each.site, config)
        if conversion is None:
            reason = (
                route.why if route.kind == "refused" else "it is no product of thin matrices; give rank= or energy="
            )
            refused.append(f"{each.path} ({each.method.name}): {reason}")
        else:
            used.setdefault(conversion, []).append(each)
    if refused:
        raise AddendaError(f"{len(refused)} sites have no form in PEFT: {'; '.join(refused[:6])}.")
    whole, rows = used.pop(NORMS, []), used.pop(TOKENS, [])
    if not used and not rows and whole and not values and all(is_norm(e.site.module) for e in whole):
        return NORMS.write(whole)
    stored = {e.path: e.site.kind.from_matrix(e.values()["value"], e.site.weight) for e in whole}
    values |= {copies.parameter_path(e.site): stored[e.path] for e in whole}
    if not used and not values and len({e.method for e in rows}) == 1:
        return TOKENS.write(rows)
    made = _changes(adapter, used, bool(rows))
    tokens.add(made, rows)
    return made


def _changes(adapter: Adapter, used: dict[Conversion, list[Live]], as_lora: bool) -> Written:
    """Return one config of all sites that are neither copies nor tokens: LORA where as_lora says so, or they mix."""
    lora = CONVERSIONS["LORA"]
    if not used:
        made = written({})
        made.modules = "dummy-target-modules"  # PEFT's own word for: none
        return made
    if len(used) == 1 and not (as_lora and lora not in used):
        ((conversion, sites),) = used.items()
        made = conversion.write(sites)
        made.modules = [e.path for e in sites] if made.modules is None else made.modules
        return made
    listed = [e for sites in used.values() for e in sites]
    others = {c.type: e for c, sites in used.items() for e in sites if lora.route(e.method, e.site) is None}
    if others:
        kinds = ", ".join(c.type for c in used)
        raise AddendaError(
            f"{adapter.name!r} has sites of {len(used)} types of PEFT ({kinds}{', tokens' if as_lora else ''}), a "
            f"folder has one, and {next(iter(others))} is no low-rank change. Give rank= or energy= for a LoRA of all "
            "of them, or export to 'merged'."
        )
    return lora.write(listed)


def _refuse_barred(made: Written, config: object) -> None:
    """Raise AddendaError for modules that PEFT would not load: methods of other types may have come to a LORA."""
    if made.config["peft_type"] in layout.BARRED and isinstance(made.modules, list):
        raw = (p.rpartition(".")[0] for p in made.config.get("target_parameters", ()))
        refuse(
            [f"{p}: {reason}" for p in (*made.modules, *raw) if (reason := layout.barred(p, config))], "No form in PEFT"
        )


def _common(root: nn.Module) -> dict[str, Any]:
    """Return the keys that every config has. Without a path of this machine: a folder's name is no address."""
    source = getattr(getattr(root, "config", None), "_name_or_path", "") or ""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": None if Path(source).is_absolute() else source or None,
        "inference_mode": True,
        "peft_version": "0.21.2",  # the version whose format this is
        "revision": None,
        "task_type": _task(root),
    }


def _task(root: nn.Module) -> str | None:
    """Return PEFT's name for what a model is for; None where what it makes of such a task does not call this model."""
    names = [c.__name__ for c in type(root).__mro__]
    task = next((task for end, task in _TASKS.items() if any(n.endswith(end) for n in names)), None)
    reads_tokens = getattr(root, "main_input_name", "input_ids") == "input_ids"  # PEFT passes input_ids, None too
    two_parts = getattr(getattr(root, "config", None), "is_encoder_decoder", False)
    return task if reads_tokens and (two_parts or task != "SEQ_2_SEQ_LM") else None


def targets(root: nn.Module, paths: list[str]) -> list[str] | str:
    """Return target_modules: whole paths, or one expression where a path ends another module's path too."""
    others = [n for n, _ in root.named_modules() if n and n not in set(paths)]
    if any(o.endswith(f".{p}") for p in paths for o in others):
        return "|".join(re.escape(p) for p in sorted(paths))
    return sorted(paths)
