"""A recipe's own file of claims (*_claims.toml): one margin for all, and of each claim what its class names."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from addenda import AddendaError

C = TypeVar("C")


def claims_of(
    file: Path, form: type[C], about: str, allowed: Mapping[str, Sequence[Any]]
) -> tuple[float, tuple[C, ...]]:
    """Return the margin, and the claims as objects of `form`, a dataclass with a name and what refutes the claim.

    about: what they are of, for an error; allowed: the values of a field. Raises AddendaError for a file that cannot be
    read, a field that is missing, unknown, of another type or out of range, and for two claims of one name.
    """
    try:
        whole = tomllib.loads(file.read_text(encoding="utf-8"))
        claims = tuple(form(**one) for one in whole["claims"])
        margin = float(whole["margin"])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise AddendaError(f"{file} holds no claims of {about}: {error}. Restore it from the repository.") from None
    if not 0 < margin < 1:
        raise AddendaError(f"{file}: margin is between 0 and 1, got {margin}.")
    names: list[str] = []
    kinds = {k: (int, float) if kind is float else (kind,) for k, kind in get_type_hints(form).items()}
    for claim in claims:
        said: dict[str, Any] = vars(claim)
        problems = [f"{k} is {said[k]!r}, {of[-1].__name__} was expected" for k, of in kinds.items()
                    if type(said[k]) not in of]  # fmt: skip
        problems += [f"{k} is one of {', '.join(map(str, of))}, got {said[k]!r}" for k, of in allowed.items()
                     if said[k] not in of]  # fmt: skip
        if not problems and not said["refuted"].strip():
            problems.append("it does not say what refutes it")
        if said["name"] in names:
            problems.append("it has a name that another has")
        if problems:
            raise AddendaError(f"{file}: claim {said['name']!r}: {'; '.join(problems)}.")
        names.append(said["name"])
    return margin, claims
