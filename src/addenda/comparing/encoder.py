"""The embedded encoder on docstrings as a comparison's subject: small enough for many trials on any machine.

The head is fitted to the frozen encoder's features beforehand and then belongs to the base, so that an arm's learning
rate is its own and the base is what a head alone can do.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from addenda.comparing.entries import DataRecord
from addenda.comparing.subject import Subject, of_splits
from addenda.core.state.outside import drawn_at_random
from addenda.data.batches import Collator
from addenda.data.docstrings import SIZES, docstrings, splits
from addenda.data.encode import encode
from addenda.models.load import load_model

HEAD_STEPS = 300


def on_docstrings(
    folder: str | Path,
    task: str = "library",
    *,
    sizes: Mapping[str, int] = SIZES,
    dtype: str = "auto",
    tell: Callable[[str], None] = lambda text: None,
) -> Subject:
    """Return a BERT-like encoder, its head fitted, on one of the two tasks of `data.docstrings`: "library" or "kind".

    folder: of the encoder, see `models.encoders`. sizes: examples of each split. tell: is called with a sentence before
    what is slow.
    """
    data = splits(docstrings(tell=tell), task, sizes)
    said = f"What an installed library's docstring says, and its {task}: {', '.join(data['train'].labels or ())}"
    loaded = load_model(folder, task="label", labels=len(data["train"].labels or ()), dtype=dtype)
    encoded = {k: encode(d, loaded.tokenizer, max_length=64, overflow="truncate") for k, d in data.items()}
    on = of_splits(loaded, data, encoded, DataRecord(name=f"docstrings-{task}", description=said))
    fit_head(on)
    return replace(on, heads=(), fresh=False, attention="sdpa")  # one for every machine: no number follows its clock


def fit_head(on: Subject) -> None:
    """Fit pooler and classifier to the first token's features: AdamW on all of train, the best on validation.

    They are the base's from then on: no adapter has to hold them.
    """
    model: Any = on.model
    sizes: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for part in ("train", "validation"):
        encoded: Any = on.splits[part]
        collate, rows = Collator(encoded.pad, encoded.kind), range(len(encoded))
        with torch.no_grad():
            seen = [collate([encoded[i] for i in rows[k : k + 64]]) for k in rows[::64]]
            labels = torch.cat([batch.pop("labels") for batch in seen])
            sizes[part] = torch.cat([model.bert(**b).last_hidden_state[:, 0] for b in seen]).float(), labels
    layers = (model.bert.pooler.dense, model.classifier)
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(*layers[0].weight.shape), nn.Tanh(), nn.Linear(*layers[1].weight.shape[::-1]))
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=1e-2)
    best, kept = math.inf, head.state_dict()
    for step in range(HEAD_STEPS):
        x, labels = sizes["train"]
        nn.functional.cross_entropy(head(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            with torch.no_grad():
                x, labels = sizes["validation"]
                loss = float(nn.functional.cross_entropy(head(x), labels))
            if loss < best:
                best, kept = loss, {k: t.clone() for k, t in head.state_dict().items()}
    with torch.no_grad():
        for layer, place in zip(layers, ("0", "2"), strict=True):
            layer.weight.copy_(kept[f"{place}.weight"])
            layer.bias.copy_(kept[f"{place}.bias"])
    drawn_at_random(model, ())
