"""What a file of kohya or LyCORIS holds, for people; no model is needed."""

from collections import Counter
from pathlib import Path

from torch import Tensor

from addenda.core.base.visible import label
from addenda.exporting.kohya.file import read_file
from addenda.exporting.kohya.forms import BESIDE, LOHA, LOKR, LORA, UNREAD
from addenda.exporting.kohya.names import ORIGINAL

_NOTED = ("ss_base_model_version", "ss_network_module", "ss_network_args", "ss_output_name")


def describe(path: str | Path) -> str:
    """Return the parts of a file with their methods, ranks and alphas, and its size, in a few lines.

    Raises AddendaError for a file that is missing, damaged, or no such file.
    """
    file = read_file(path)
    lines = [f"{file.path.name}: a file of kohya or LyCORIS"]
    noted = [f"{k}={label(file.metadata[k], 80)}" for k in _NOTED if k in file.metadata]
    if noted:
        lines.append(f"  by its own word: {', '.join(noted)}")
    every: list[Tensor] = []
    for part, modules in file.parts.items():
        every += [t for tensors in modules.values() for t in tensors.values()]
        layout = ", names of the original layout" if any(ORIGINAL.match(name) for name in modules) else ""
        lines.append(f"  {part} × {len(modules)}{layout}")
        forms = Counter(_form(tensors) for tensors in modules.values())
        lines += [f"    {form} × {count}" for form, count in forms.most_common(8)]
        lines += [f"    … and {len(forms) - 8} other forms"] * (len(forms) > 8)
    numbers, size = sum(t.numel() for t in every), sum(t.numel() * t.element_size() for t in every)
    dtypes = ", ".join(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in every))
    lines.append(f"  {numbers:,} numbers in {dtypes}, {size:,} bytes of tensors")
    return "\n".join(lines)


def _form(tensors: dict[str, Tensor]) -> str:
    """Return a module's method with its rank and alpha, as it is called where such files are made."""
    unread = next((s for s in tensors if s in UNREAD), None)
    if unread is not None:
        return f"{unread} (not read: {UNREAD[unread].partition(',')[0].partition(';')[0]})"
    kernel = tensors[LORA[0]].shape[2:] if LORA[0] in tensors else ()
    name = "LoRA" if all(k == 1 for k in kernel) else "LoCon"
    second = "lokr_w2_b" if "lokr_w2_b" in tensors else LOKR[2]
    for title, names, ranked in ((name, LORA, LORA[0]), ("LoHa", LOHA, LOHA[1]), ("LoKr", LOKR, second)):
        if any(n in tensors for n in names):
            factor = tensors.get(ranked)
            words = [
                title,
                "whole factors" if factor is None else f"rank {len(factor)}" if factor.dim() else f"{ranked} no matrix",
            ]
            words += ["Tucker"] * any(n in tensors for n in ("lora_mid.weight", "hada_t1", "lokr_t2"))
            words += ["DoRA"] * ("dora_scale" in tensors)
            alpha = tensors.get("alpha")
            words += [f"alpha {float(alpha):g}"] if alpha is not None and alpha.numel() == 1 else []
            return ", ".join(words)
    return ", ".join(label(s, 40) for s in tensors if s not in BESIDE)[:120] or "alpha without factors"
