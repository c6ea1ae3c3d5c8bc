"""PEFT's folders, both ways, row by row: how far the logits of whoever reads are from those of whoever wrote.

`read`: PEFT trains and saves, addenda reads. `write`: addenda trains and writes, PEFT loads. `round`: both in turn.
Trained tensors are moved at random first: at the start most methods are the base, and any reading would pass. Every
step runs in a process of its own; `python -m bench peft_parity` writes the table, tests/exporting/peft run its rows.
"""

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.peft_rows import ROWS, Row

BOUND, LEAST = 1e-5, 1e-2  # of the largest logit: the difference that is allowed, and what an adapter must move
_THEIRS = (  # PEFT's own warnings, by their words
    "Failed to load the CUDA extension",
    "Setting boft_n_butterfly_factor to 1",
    "Invalid `oft_block_size`",
    "Invalid `r`",
    "Setting `save_embedding_layers` to `True`",
    "Sparse invariant checks are implicitly disabled",
    "Unsupported layer type '<class 'transformers.models.llama.modeling_llama.LlamaRMSNorm'>'",
    "Could not find a config file",  # of a model that is on no hub
    "`is_gradient_checkpointing` is deprecated",  # which PEFT asks of transformers
)


class Convolutions(nn.Module):
    """Convolutions over one and two dimensions, with groups, strides and other kernels: (batch, 8, 6, 6) to logits."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.point = nn.Conv2d(16, 16, 1, bias=False)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.line = nn.Conv1d(16, 12, 3, padding=1)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.point(torch.tanh(self.wide(x))))
        x = torch.tanh(self.line(torch.tanh(self.grouped(x)).flatten(2)))
        return self.out(x.mean(-1))


_SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    more: dict[str, Any] = {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**_SIZES, **more, pad_token_id=0))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 64}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    more: dict[str, Any] = {"vocab_size": 64, "max_position_embeddings": 32, "num_labels": 5}
    return BertForSequenceClassification(BertConfig(**_SIZES, **more))


BASES: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama, "gpt2": _gpt2, "bert": _bert, "convolutions": Convolutions,
}  # fmt: skip


def base_of(row: Row) -> nn.Module:
    """The base of a row: the same weights every time."""
    torch.manual_seed(0)
    model = BASES[row.base]().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:  # the start of transformers is so small that little would be seen of a change
                p.normal_(std=p[0].numel() ** -0.5)
            elif name.endswith("bias"):  # and a bias of zero would hide what is done to it
                p.normal_(std=0.1)
    return model


@torch.no_grad()
def logits(model: nn.Module, row: Row) -> Tensor:
    """What a model says of the row's batch."""
    stream = torch.Generator().manual_seed(5)
    if row.base == "convolutions":
        return model(torch.randn(3, 8, 6, 6, generator=stream))
    ids = torch.randint(1, 64, (2, 12), generator=stream)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@contextmanager
def quiet() -> Iterator[None]:
    """Without PEFT's own warnings; keys that PEFT misses or does not know are errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Ff]ound (missing|unexpected) adapter keys")
        for words in _THEIRS:
            warnings.filterwarnings("ignore", message=f".*{re.escape(words)}")
        yield


@torch.no_grad()
def _moved(parameters: Iterator[nn.Parameter], std: float) -> None:
    stream = torch.Generator().manual_seed(3)
    for p in parameters:
        p += torch.randn(p.shape, generator=stream) * std


def peft_writes(row: Row, folder: Path) -> dict[str, Tensor]:
    """PEFT makes an adapter, moves it and saves it: {"base": logits, "live": logits}."""
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    options = dict(row.peft or {})
    with quiet():
        config = PEFT_TYPE_TO_CONFIG_MAPPING[options.pop("peft_type")](**options)
        model = get_peft_model(base_of(row), config).eval()
        _moved((p for p in model.parameters() if p.requires_grad), row.std)
        live = logits(model, row)
        model.save_pretrained(str(folder))
    return {"base": logits(base_of(row), row), "live": live}


def peft_reads(row: Row, folder: Path) -> Tensor:
    """PEFT loads a folder onto a fresh base: logits."""
    from peft import PeftModel

    with quiet():
        return logits(PeftModel.from_pretrained(base_of(row), str(folder)).eval(), row)


def addenda_writes(row: Row, folder: Path) -> dict[str, Tensor]:
    """addenda attaches an adapter, moves it and writes it: {"base": logits, "live": logits}."""
    import addenda as ad
    from addenda.exporting.peft.write import write

    model = base_of(row)
    adapter = ad.attach(model, row.ours, **row.attach)
    _moved((p for p in adapter.parameters() if p.requires_grad), row.std)
    folder.mkdir(exist_ok=True)
    write(adapter, folder)
    return {"base": logits(base_of(row), row), "live": logits(model, row)}


def addenda_reads(row: Row, folder: Path, again: Path | None = None) -> Tensor:
    """addenda reads a folder onto a fresh base, and writes it `again`: logits."""
    from addenda.exporting.install import install
    from addenda.exporting.peft.read import read
    from addenda.exporting.peft.write import write

    model = base_of(row)
    forms = read(folder, model)
    adapter = install(model, forms.sites, name="x", heads=forms.heads, pools=forms.pools, activate=True)
    if again is not None:
        again.mkdir()
        write(adapter, again)
    return logits(model, row)


def compared(made: dict[str, Tensor], got: Tensor) -> dict[str, float]:
    """What an adapter moves, and how far another reading of it is from it, of the largest logit."""
    size = float(made["live"].abs().max())
    return {
        "moved": float((made["live"] - made["base"]).abs().max()) / size,
        "difference": float((got - made["live"]).abs().max()) / size,
    }


def _directly(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def measure(row: Row, folder: Path, call: Callable[..., Any] = _directly) -> dict[str, dict[str, float]]:
    """Every way that a row can go, through an empty folder. call: how a step is run, in a process of its own or not."""
    found = {}
    if row.peft is not None:
        made = call(peft_writes, row, folder / "theirs")
        again = folder / "again" if row.again else None
        found["read"] = compared(made, call(addenda_reads, row, folder / "theirs", again))
        if again is not None:
            found["round"] = compared(made, call(peft_reads, row, again))
    if row.ours is not None:
        made = call(addenda_writes, row, folder / "ours")
        found["write"] = compared(made, call(peft_reads, row, folder / "ours"))
        found["back"] = compared(made, call(addenda_reads, row, folder / "ours"))
    return found


def run(given: Any) -> tuple[dict, str]:
    """Measure all rows, every step in a process of its own."""
    from bench.measure import in_process

    found = {}
    for kind, rows in ROWS.items():
        for row in rows:
            with tempfile.TemporaryDirectory() as folder:
                found[f"{kind} {row.name}".strip()] = {"base": row.base} | measure(row, Path(folder), in_process)
    return found, table(found)


def table(found: dict) -> str:
    """The table as people read it."""
    ways = ("read", "write", "round")
    lines = ["| PEFT | base | moved | " + " | ".join(ways) + " |", "| --- | --- | --- |" + " --- |" * len(ways)]
    for name, each in found.items():
        moved = min(each[w]["moved"] for w in ways if w in each)
        cells = [f"{each[w]['difference']:.1e}" if w in each else "–" for w in ways]
        lines.append(f"| {name} | {each['base']} | {moved:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
