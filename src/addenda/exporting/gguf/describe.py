"""A summary of a GGUF adapter in a few lines; no model needed."""

from pathlib import Path
from textwrap import wrap

from addenda.core.base.visible import label
from addenda.core.disk.access import shown
from addenda.core.site.targets import grouped
from addenda.exporting.gguf.architectures import known
from addenda.exporting.gguf.head import read_head
from addenda.exporting.gguf.read import check_adapter, paired


def describe(path: str | Path) -> str:
    """Return what a LoRA in GGUF holds, in a few lines.

    Raises AddendaError for a file that is damaged or no LoRA; what `read` would refuse is told in a line.
    """
    head = read_head(path)
    alpha = check_adapter(head)
    pairs, problems = paired(head)
    name = head.text("general.architecture")
    kinds = ", ".join(known(name)) or "none that is read here"
    ranks = sorted({two[".lora_b"].shape[-1] for two in pairs.values() if ".lora_b" in two})
    scale = f"alpha {alpha:g}, so the scale is {alpha:g} / rank" if alpha else "alpha 0, so the scale is 1"
    lines = [
        f"{shown(path)}: GGUF adapter (LoRA) for {label(name, 40) or 'no architecture'} (of transformers: {kinds})",
        f"  rank {', '.join(map(str, ranks[:12]))}{' …' if len(ranks) > 12 else ''}; {scale}",
    ]
    groups = list(grouped(pairs).items())
    shown_groups = ", ".join(f"{label(g, 80)} × {len(p)}" for g, p in groups[:40])
    more = f", … and {len(groups) - 40:,} more" if len(groups) > 40 else ""
    lines += wrap(shown_groups + more, 80, initial_indent="  ", subsequent_indent="  ", break_long_words=False)
    dtypes = ", ".join(dict.fromkeys(e.dtype for e in head.tensors))
    numbers = sum(e.numbers for e in head.tensors)
    lines.append(f"  {numbers:,} numbers in {len(head.tensors):,} tensors ({dtypes}), {head.size:,} bytes")
    lines += [f"  not read: {p}" for p in problems[:12]]
    return "\n".join(lines)
