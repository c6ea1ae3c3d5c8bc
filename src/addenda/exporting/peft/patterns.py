"""Numbers that differ from site to site, as PEFT's configs say them: one for most, patterns by path for the rest."""

from collections.abc import Mapping
from typing import Any

from addenda.core.base.errors import AddendaError
from addenda.exporting.peft.conversion import Config, number, pattern_value

Ranks = tuple[int, float]


def patterned(values: Mapping[str, Any], option: str, patterns: str) -> Config:
    """Return {option: what most sites have, patterns: {path: what the others have}}.

    A path that ends another site's path too is anchored, since PEFT matches ends.
    """
    listed = [*values.values()]
    most = max(dict.fromkeys(listed), key=listed.count)
    ends = {path for path in values if any(other.endswith(f".{path}") for other in values)}
    rest = {f"^{path}" if path in ends else path: _plain(v) for path, v in values.items() if v != most}
    return {option: _plain(most), patterns: rest}


def ranks_of(config: Config, path: str) -> Ranks:
    """Return the rank and alpha of a site in the configs of LOHA and LOKR. Raises AddendaError where they are none."""
    rank = pattern_value(config.get("rank_pattern"), path, number(config, "r", int, 8), "rank_pattern")
    alpha = pattern_value(config.get("alpha_pattern"), path, number(config, "alpha", float, 8), "alpha_pattern")
    rank, alpha = number({"r": rank}, "r", int), float(number({"alpha": alpha}, "alpha", float))
    if rank < 1:
        raise AddendaError(f"The config of this PEFT adapter gives {path} the rank {rank}.")
    return rank, alpha


def ranked(ranks: Mapping[str, Ranks]) -> Config:
    """Return r, alpha and their patterns from the rank and alpha of each site."""
    rank = patterned({path: r for path, (r, _) in ranks.items()}, "r", "rank_pattern")
    return rank | patterned({path: a for path, (_, a) in ranks.items()}, "alpha", "alpha_pattern")


def _plain(value: Any) -> Any:
    """Return a whole number as one: readers of a config want no 8.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
