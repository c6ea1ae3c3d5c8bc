"""PEFT's VBLORA: low-rank factors mixed from one bank that all sites share; logits and the bank, as they are.

Not with `save_only_topk_weights`: such a folder holds the chosen vectors and no logits.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method
from addenda.core.site.site import Site
from addenda.exporting.install import Forms
from addenda.exporting.peft.conversion import Config, Conversion, Live, Saved, Written, expect, number, one, refuse
from addenda.exporting.routes import Route
from addenda.methods.vb_lora import VBLoRA

A, B, BANK = "vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"


class VbLoraConversion(Conversion):
    """VB-LoRA on linear layers and GPT-2's Conv1D, of widths that the length of a vector divides."""

    type = "VBLORA"
    suffixes = (A, B, *(f"{name}_topk_{what}" for name in (A, B) for what in ("indices", "weights")))
    shared = (BANK,)
    reads = frozenset(["r", "num_vectors", "vector_length", "topk", "save_only_topk_weights", "fan_in_fan_out"])
    ignores = frozenset(["vblora_dropout", "init_vector_bank_bound", "init_logits_std"])

    def read(self, config: Config, saved: Sequence[Saved], shared: Mapping[str, Tensor], forms: Forms) -> None:
        if config.get("save_only_topk_weights"):
            raise AddendaError(
                "This VBLORA adapter of PEFT was saved with save_only_topk_weights: it holds which vectors were chosen "
                "and no logits, so that nothing can go on from it. Save it again without, or merge it in PEFT "
                "(merge_and_unload, then save_pretrained) and take the change out: addenda extract --base … --tuned …"
            )
        names = {"rank": "r", "vectors": "num_vectors", "length": "vector_length", "topk": "topk"}
        defaults = {"rank": 4, "vectors": 256, "length": 256, "topk": 2}
        method = VBLoRA(**{k: number(config, name, int, defaults[k]) for k, name in names.items()})
        bank = shared.get(BANK)
        problems = [] if bank is not None else [f"it lacks base_model.{BANK}"]
        if bank is not None and list(bank.shape) != [method.vectors, method.length]:
            problems.append(f"{BANK} is {list(bank.shape)}, and the config says {[method.vectors, method.length]}")
        for s in saved:
            (m, n), problem = s.site.shape, []
            if not _has_place(s.site, method):
                problem = [f"{s.path}: PEFT has VBLORA for Linear and Conv1D of widths that vector_length divides"]
            else:
                pieces = {A: (method.rank, n // method.length), B: (m // method.length, method.rank)}
                problem = expect(s, {k: (*shape, method.vectors) for k, shape in pieces.items()})
            problems += problem
            if not problem:
                forms.sites[s.path] = method, {"a": s.tensors[A], "b": s.tensors[B]}
        refuse(problems, "This VBLORA adapter of PEFT does not fit")
        assert bank is not None
        forms.pools[method] = {"bank": bank}

    def route(self, method: Method, site: Site) -> Route | None:
        return Route("exact", "VBLORA") if type(method) is VBLoRA and _has_place(site, method) else None

    def write(self, live: Sequence[Live]) -> Written:
        one(live, *(f.name for f in dataclasses.fields(VBLoRA)))  # other options, another bank
        method, transposed = live[0].method, {each.site.kind.transposed for each in live}
        made = Written({"peft_type": self.type, "r": method.rank, "num_vectors": method.vectors, "bias": "none"})
        made.config |= {"vector_length": method.length, "topk": method.topk, "vblora_dropout": method.dropout}
        made.config |= {"save_only_topk_weights": False, "fan_in_fan_out": transposed == {True}}
        for each in live:
            p = each.values()
            made.tensors |= {f"{each.path}.{A}": p["a"], f"{each.path}.{B}": p["b"]}
            made.shared[BANK] = p["bank"]
        return made


def _has_place(site: Site, method: VBLoRA) -> bool:
    flat = site.kind.name in ("linear", "conv1d")
    return flat and not any(width % method.length for width in site.shape) and method.check(*site.shape) is None
