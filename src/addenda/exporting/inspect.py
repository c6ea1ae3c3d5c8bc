"""Telling what an adapter holds, whoever wrote it; no model is needed."""

from collections import Counter
from pathlib import Path

from torch import Tensor

from addenda.core.base.visible import label
from addenda.core.file.inspect import inspect as ours
from addenda.core.site.targets import grouped
from addenda.exporting.doors import DOORS
from addenda.exporting.formats import format_of
from addenda.exporting.peft.folder import PREFIX, ROOT, read_folder


def inspect(path: str | Path) -> str:
    """Return what an adapter file of addenda, GGUF or kohya, or a folder of PEFT holds, for people.

    Raises AddendaError for what is no adapter, or is damaged.
    """
    kind = format_of(path)
    if kind == "addenda":
        return ours(path)
    if kind == "peft":
        return _peft(path)
    return DOORS[kind].describe(Path(path).expanduser())


def _peft(path: str | Path) -> str:
    folder = read_folder(path)
    config, sites = folder.config, {}
    for key, t in folder.tensors.items():
        module, name = _split(key)
        sites.setdefault(module, {})[name] = t
    lines = [f"{folder.path.name}: an adapter of PEFT, {label(folder.type, 60)}"]
    shown = {
        k: v for k, v in config.items() if k in ("r", "lora_alpha", "alpha", "use_rslora", "use_dora", "task_type")
    }
    shown = {k: v for k, v in shown.items() if v not in (None, False)}
    if shown:
        lines.append("  " + ", ".join(f"{k}={label(v, 40)}" for k, v in shown.items()))
    if source := config.get("base_model_name_or_path"):
        lines.append(f"  trained on {label(source, 120)} (by its own word: nothing in the folder proves it)")
    forms = {p: ", ".join(f"{n} {list(t.shape)}" for n, t in tensors.items()) for p, tensors in sites.items()}
    for pattern, paths in grouped(sites).items():
        kinds = Counter(forms[p] for p in paths).most_common()
        more = f" and {len(kinds) - 1} other forms" if len(kinds) > 1 else ""
        line = f"  {label(pattern, 200)} × {len(paths)}: {label(kinds[0][0], 200)}{more}"
        lines += [line] if len(line) <= 80 else line.replace(": ", ":\n    ", 1).splitlines()
    lines.append(f"  {sum(t.numel() for t in folder.tensors.values()):,} numbers, {_bytes(folder.tensors):,} bytes")
    return "\n".join(lines)


def _split(key: str) -> tuple[str, str]:
    """Return a key's module and the name of its tensor there: "…q_proj" and "lora_A.weight"."""
    rest = key.removeprefix(PREFIX).removeprefix(ROOT)
    parts = rest.split(".")
    here = 2 if len(parts) > 2 and parts[-1] in ("weight", "bias") and "_" in parts[-2] and _made(parts[-2]) else 1
    return ".".join(parts[:-here]), ".".join(parts[-here:])


def _made(name: str) -> bool:
    """Return whether a name is that of a holder of tensors which PEFT has made, "lora_A", and no module's."""
    return any(c.isupper() for c in name) or name.endswith("_layers")


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
