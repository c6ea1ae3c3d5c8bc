"""The tensors of a model that have an entry for every token: the embedding, the output head, a head's bias."""

import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.base.sharded import is_sharded
from addenda.core.disk.access import read_json
from addenda.core.site.site import owners_of


def tables_of(root: Any) -> dict[str, Tensor]:
    """Return the tensors of a model that have an entry for every token, by their first name, the embedding first."""
    found: dict[str, Tensor] = {}
    owners = owners_of(root)
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(root, ask)() if callable(getattr(root, ask, None)) else None
        except NotImplementedError:
            module = None
        if not found and not isinstance(module, nn.Embedding):
            raise AddendaError(
                f"A {type(root).__name__} does not say where its table of tokens is (get_input_embeddings), so it "
                "cannot be grown."
            )
        for p in () if module is None else module._parameters.values():
            if p is not None and not any(p is t for t in found.values()):
                path, _, leaf = owners[id(p)][0]
                found[f"{path}.{leaf}" if path else leaf] = p
    rows = len(next(iter(found.values())))
    found |= {n: b for n, b in root.named_buffers() if n.endswith("final_logits_bias") and b.shape == (1, rows)}
    problems = [f"{path}: {reason}" for path, t in found.items() if (reason := fixed(t))]
    problems += [
        f"{path} has no {rows:,} rows, but {list(t.shape)}" for path, t in found.items() if rows not in t.shape
    ]
    ids = {id(t) for t in found.values()}
    others = [
        path
        for path, m in root.named_modules()
        if isinstance(m, nn.Embedding)
        and m.num_embeddings == rows
        and id(m.weight) not in ids
        and not any(word in path for word in ("pos", "bias"))
    ]
    problems += [f"{path} has {rows:,} rows too, and may be a second table of the same tokens" for path in others]
    if problems:
        raise AddendaError(f"This {type(root).__name__} cannot be grown: {'; '.join(problems[:6])}.")
    return found


def fixed(table: Tensor) -> str | None:
    """Return why a table cannot grow, or None."""
    if is_sharded(table):
        return "it is sharded over processes; load or grow first, then shard"
    if table.is_meta:
        return "it is not in memory (offloaded, or on the meta device)"
    if type(table) not in (nn.Parameter, Tensor) or not table.is_floating_point():
        return f"it is held as {type(table).__name__} of {table.dtype}, and no row can be put behind a quantised table"
    return None


def rows_in_folder(config: Any) -> int | None:
    """Return how many tokens the folder says that a model was loaded from, or None where it cannot be asked.

    Of a model of several modes the most that one of its parts is said to have.
    """
    name = str(getattr(config, "_name_or_path", "") or "")
    if not name:
        return None
    file: Any = Path(name) / "config.json"
    try:
        if not file.is_file():
            hub = sys.modules.get("huggingface_hub")  # which has brought the model, where it came from there
            revision = getattr(config, "_commit_hash", None)
            file = None if hub is None else hub.try_to_load_from_cache(name, "config.json", revision=revision)
        raw = read_json(Path(file), foreign=True) if isinstance(file, (str, Path)) else None
    except (OSError, ValueError, AttributeError, AddendaError):
        return None
    said = raw if isinstance(raw, dict) else {}
    parts = [said, *(part for part in said.values() if isinstance(part, dict))]  # of a model of several modes
    rows = [n for part in parts if type(n := part.get("vocab_size")) is int]
    return max(rows, default=None)
