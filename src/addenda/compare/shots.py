"""Judging with a shared beginning: what all examples begin with (template, shots) is read once and kept as a cache."""

import copy
import time

import torch
from torch import nn

from addenda.train.batches import Collator
from addenda.train.encode import Encoded
from addenda.train.evaluate import Evaluation, evaluate
from addenda.train.loss import score
from addenda.train.machine import device_of, training_mode


def common_prefix(examples: Encoded) -> int:
    """How many first tokens all examples share, one short of where the first of them is judged."""
    if examples.kind != "causal":
        return 0
    first, last = min(examples.ids), max(examples.ids)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    judged = min(next(i for i, t in enumerate(row) if t != -100) for row in examples.labels)
    return max(0, min(shared, judged - 1))


@torch.no_grad()
def evaluate_with_cache(model: nn.Module, examples: Encoded, batch: int = 32) -> Evaluation:
    """As `evaluate`, for a causal LM; the same verdicts up to rounding, with the shared tokens computed once."""
    n = common_prefix(examples)
    if n < 8 or not hasattr(getattr(model, "config", None), "use_cache"):
        return evaluate(model, examples=examples, batch=batch)
    started, device = time.perf_counter(), device_of(model)
    rows = [
        {"input_ids": ids[n:], "labels": labels[n:]} for ids, labels in zip(examples.ids, examples.labels, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    collate, items, losses = Collator(examples.pad, examples.kind), [0] * len(rows), [0.0] * len(rows)
    total, count = 0.0, 0
    with training_mode(model, False):
        prefix = torch.tensor([examples.ids[0][:n]], device=device)
        read = model(input_ids=prefix, use_cache=True).past_key_values
        for at in range(0, len(order), batch):
            part = order[at : at + batch]
            tensors = {k: t.to(device) for k, t in collate([rows[i] for i in part]).items()}
            seen = torch.ones(len(part), n, dtype=torch.long, device=device)
            tensors["attention_mask"] = torch.cat([seen, tensors["attention_mask"]], 1)
            cache = copy.deepcopy(read)
            cache.batch_repeat_interleave(len(part))
            made = score(model, tensors | {"past_key_values": cache, "use_cache": True}, examples.kind, right=True)
            assert made.right is not None
            total, count = total + float(made.total), count + made.count
            for i, mean, right in zip(part, made.means.tolist(), made.right.tolist(), strict=True):
                losses[i], items[i] = mean, int(right)
    seconds = time.perf_counter() - started
    return Evaluation(items, sum(items) / len(items), total / count, losses, seconds, examples.tokens)
