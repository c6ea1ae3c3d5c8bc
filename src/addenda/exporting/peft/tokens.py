"""TRAINABLE_TOKENS, and trainable_token_indices of LORA: PEFT stores the rows themselves, addenda what is added to W.

    values = rows − W[indices]        The indices stand in the config: a list, or of each module a list

Where input and output embeddings are tied, PEFT changes both, and the site is the one parameter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method
from addenda.core.site.kinds import CONV1D, EMBEDDING, LINEAR, kind_of
from addenda.core.site.site import Owners, Site, owners_of, site_at
from addenda.exporting.install import Forms
from addenda.exporting.peft.conversion import Config, Conversion, Live, Saved, Written, expect, refuse
from addenda.exporting.routes import Route
from addenda.methods.tokens import TrainableTokens

ROWS = "trainable_tokens_delta"
IN_LORA = f"token_adapter.{ROWS}"


class TokensConversion(Conversion):
    """TRAINABLE_TOKENS: one list of tokens for all embeddings of the adapter."""

    type = "TRAINABLE_TOKENS"
    suffixes = (ROWS,)
    reads = frozenset(["token_indices"])

    def place(
        self, model: nn.Module, config: Config, sites: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[list[Saved], list[str], list[str]]:
        return placed(model, sites, owners_of(model))

    def read(self, config: Config, saved: Sequence[Saved], shared: Mapping[str, Tensor], forms: Forms) -> None:
        problems: list[str] = []
        for s in saved:
            problems += read(s, _list(config.get("token_indices")), forms, ROWS)
        refuse(problems, "This TRAINABLE_TOKENS adapter of PEFT does not fit")

    def route(self, method: Method, site: Site) -> Route | None:
        if not isinstance(method, TrainableTokens):
            return None
        if kind_of(site.module) not in (EMBEDDING, LINEAR):
            return Route("refused", "PEFT trains tokens of embeddings and heads only; export to 'merged'")
        return Route("exact", "TRAINABLE_TOKENS")

    def write(self, live: Sequence[Live]) -> Written:
        found = {e.path: rows(e) for e in live}
        (indices, _), *others = found.values()
        assert all(other[0] == indices for other in others)
        modules = [e.places[0].path for e in live]
        made = Written({"peft_type": self.type, "token_indices": indices, "init_weights": True}, modules=modules)
        for each in live:
            made.tensors |= {f"{p.path}.{ROWS}": found[each.path][1].clone() for p in each.places}
        return made


def placed(
    model: nn.Module, sites: Mapping[str, Mapping[str, Tensor]], owners: Owners
) -> tuple[list[Saved], list[str], list[str]]:
    """Return the sites of rows, the paths that the model lacks, and problems; tied weights are one site."""
    saved: dict[int, Saved] = {}
    missing, problems = [], []
    for path, tensors in sites.items():
        try:
            site = site_at(model, path, owners)
        except AddendaError:
            missing.append(path)
            continue
        holders = owners[id(site.weight)]
        if len(holders) > 1 and site.kind.name != "parameter":
            site = site_at(model, f"{holders[0][0]}.{holders[0][2]}", owners)
        seen = saved.setdefault(id(site.weight), Saved(site, tensors, path))
        if any(not torch.equal(t, seen.tensors[k]) for k, t in tensors.items() if k in seen.tensors):
            problems.append(
                f"{path} and {seen.known_as} share a weight, and the adapter changes their tokens in two ways"
            )
    return list(saved.values()), missing, problems


def indices(config: Config, path: str) -> list[int]:
    """Return the tokens that a LORA config names for an embedding."""
    named = config.get("trainable_token_indices")
    if isinstance(named, dict):
        named = next((v for k, v in named.items() if path == k or path.endswith(f".{k}")), None)
    return _list(named)


def _list(named: object) -> list[int]:
    """Return a list of tokens. Raises AddendaError where it is none."""
    if not isinstance(named, list) or not named or not all(type(i) is int and 0 <= i < 1 << 40 for i in named):
        raise AddendaError(f"The config of this PEFT adapter has {str(named)[:60]!r} where a list of tokens is wanted.")
    if len(set(named)) < len(named):
        raise AddendaError("The config of this PEFT adapter names a token twice, and its last row would win or not.")
    return named


def read(s: Saved, named: list[int], forms: Forms, suffix: str) -> list[str]:
    """Put the trained rows of one embedding into `forms`; return what does not fit."""
    if s.site.weight.dim() != 2:
        return [f"{s.path} is no embedding"]
    rows_in_all, width = s.site.weight.shape
    problems = expect(s, {suffix: (len(named), width)})
    if max(named) >= rows_in_all:
        problems.append(f"{s.path} has rows 0 to {rows_in_all - 1}, and the config names token {max(named)}")
    if s.site.kind == CONV1D:
        problems.append(f"{s.path} is no embedding")
    if not problems:
        order = torch.tensor(named).argsort()
        chosen = torch.tensor(named)[order]
        old = s.site.weight.detach()[chosen.to(s.site.weight.device)].float().cpu()
        values = s.tensors[suffix].float()[order] - old
        forms.sites[s.path] = TrainableTokens(tokens=_stretches(chosen.tolist())), {"values": values}
    return problems


def _stretches(rising: list[int]) -> str:
    """Return rows as addenda names them, "5+7-9"."""
    parts: list[list[int]] = []
    for i in rising:
        if parts and parts[-1][1] == i - 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    return "+".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def rows(live: Live) -> tuple[list[int], Tensor]:
    """Return the tokens of a site and their rows as PEFT stores them."""
    p = live.values()
    old = live.site.weight.detach().cpu()[p["index"]].float()
    return p["index"].tolist(), old + p["values"].float()


def add(made: Written, live: Sequence[Live]) -> None:
    """Add trained rows to a LORA that is being written."""
    named: dict[str, Any] = {}
    for each in live:
        named[each.places[0].path], values = rows(each)
        made.tensors[f"{each.places[0].path}.{IN_LORA}"] = values
    if named:
        made.config["trainable_token_indices"] = named
