"""What an adapter was trained on besides the base: its tokenizer, and the adapters that acted beside it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Beside:
    """An adapter that acted while another was trained: its name then, and the SHA-256 of what it holds."""

    name: str
    sha256: str


@dataclass(frozen=True)
class TrainedOn:
    """The circumstances of a training, by hash. tokenizer: as `core.file.tokenizer.mark`, of so many entries."""

    tokenizer: str | None = None
    entries: int | None = None
    beside: tuple[Beside, ...] = ()

    def __str__(self) -> str:
        parts = [f"{b.name} ({b.sha256[:12]}…)" for b in self.beside]
        lines = [f"trained beside {', '.join(parts)}"] if parts else []
        if self.tokenizer is not None:
            lines.append(f"tokenizer of {self.entries:,} tokens ({self.tokenizer[:12]}…)")
        return "; ".join(lines)
