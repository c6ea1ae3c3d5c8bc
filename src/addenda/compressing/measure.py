"""What compression costs and brings: perplexity, outputs, and tokens a second, of the model as it stands."""

import inspect
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.modules.borrow import training_mode
from addenda.core.state.cache_length import as_given, cache_of
from addenda.models.kinds import task_of
from addenda.reducing.walk import Batch


def takes_cache(model: nn.Module) -> bool:
    """Return whether a model can be told to keep no cache of keys and values."""
    return "use_cache" in inspect.signature(type(model).forward).parameters


def positions(model: Any) -> int | None:
    """Return how many tokens a model is made to read at once; None where its configuration sets no such limit."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    tables = (m for p, m in model.named_modules() if p.endswith("position_embeddings") and isinstance(m, nn.Embedding))
    offset = next((m.padding_idx + 1 for m in tables if m.padding_idx is not None), 0)  # RoBERTa counts from behind it
    return limit - offset


@torch.no_grad()
def loss_of(model: nn.Module, batches: list[Batch]) -> float:
    """Return the mean cross-entropy of the next token in nats over all windows; its exponential is perplexity."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with training_mode(model, False):
        for batch in batches:
            ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            options: dict[str, Any] = {"use_cache": False} if takes_cache(model) else {}
            logits = model(input_ids=ids, attention_mask=mask, **options).logits
            for row, labels, real in zip(logits[:, :-1], ids[:, 1:], mask[:, 1:].bool(), strict=True):
                total += float(F.cross_entropy(row[real].float(), labels[real], reduction="sum"))
                count += int(real.sum())
    if not count or total != total:
        raise AddendaError(
            f"The model's loss is {total} over {count} tokens; it cannot be judged. Try --dtype float32."
        )
    return total / count


@torch.no_grad()
def outputs_of(model: nn.Module, batches: list[Batch]) -> Tensor:
    """Return (windows × labels): what an encoder with a head says of every window, in float64."""
    device = next(model.parameters()).device
    with training_mode(model, False):
        return torch.cat([model(**{k: v.to(device) for k, v in b.items()}).logits.double().cpu() for b in batches])


def judged(model: nn.Module, batches: list[Batch]) -> dict[str, Any]:
    """Return {"perplexity"} of a causal LM, {"outputs"} of a classifier."""
    if task_of(model) == "causal":
        return {"perplexity": float(torch.tensor(loss_of(model, batches)).exp())}
    return {"outputs": outputs_of(model, batches).tolist()}


def harm(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Return the rise of perplexity as a share, or how far a classifier's outputs have moved, ‖a − b‖ / ‖a‖."""
    if "perplexity" in before:
        return after["perplexity"] / before["perplexity"] - 1
    a, b = torch.tensor(before["outputs"]), torch.tensor(after["outputs"])
    return float((a - b).norm() / a.norm().clamp_min(1e-30))


def compared(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return perplexities or outputs before and after, in a line."""
    worse = harm(before, after)
    if "perplexity" in before:
        return f"perplexity {before['perplexity']:.3f} dense, {after['perplexity']:.3f} compressed ({worse:+.1%})"
    a, b = torch.tensor(before["outputs"]), torch.tensor(after["outputs"])
    agreement = float((a.argmax(-1) == b.argmax(-1)).float().mean())
    return f"outputs differ by {worse:.2%}, the most likely label is the same for {agreement:.1%}"


def seconds(
    model: nn.Module, ids: Tensor, forms: dict[str, Callable[[], None]], *, rounds: int = 5, decode: int = 24
) -> dict[str, dict[str, list[float]]]:
    """Return seconds of every round, by form of the model: `prefill` of one row of ids (1 × length), `decode`.

    A form is a function that puts it in place. The forms take turns, so that a busy machine is busy for all of them:
    compare them round by round. A first round is not counted. decode: tokens one by one behind that row, for causal LMs
    that keep a cache of keys and values.
    """
    times: dict[str, dict[str, list[float]]] = {form: {} for form in forms}
    ids = ids.to(next(model.parameters()).device)
    with torch.no_grad(), training_mode(model, False):
        for turn in range(rounds + 1):
            for form, switch in forms.items():
                switch()
                for phase, duration in _timed(model, ids, decode).items():
                    if turn:
                        times[form].setdefault(phase, []).append(duration)
    return times


def speeds(
    model: nn.Module, ids: Tensor, forms: dict[str, Callable[[], None]], *, rounds: int = 5, decode: int = 24
) -> dict[str, dict[str, float]]:
    """Return tokens a second by the median of `seconds`. The row is cut to leave positions for decode."""
    if (limit := positions(model)) is not None and limit < ids.shape[1] + decode:
        decode = min(decode, limit // 2)
        ids = ids[:, : limit - decode]
    tokens = {"prefill": ids.shape[1], "decode": decode}
    times = seconds(model, ids, forms, rounds=rounds, decode=decode)
    return {form: {phase: tokens[phase] / median(s) for phase, s in runs.items()} for form, runs in times.items()}


def _timed(model: Any, ids: Tensor, decode: int) -> dict[str, float]:
    def now() -> float:
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
        return time.perf_counter()

    if task_of(model) != "causal" or not takes_cache(model):
        started = now()
        model(input_ids=ids)
        return {"prefill": now() - started}
    started = now()
    output = model(input_ids=ids, use_cache=True)
    middle = now()
    cache, token = cache_of(output), ids[:, -1:]
    if cache is None:  # a state of another kind, such as Mamba's
        return {"prefill": middle - started}
    for _ in range(decode):
        output = model(input_ids=token, use_cache=True, **as_given(model, cache))
        cache = cache_of(output)
    return {"prefill": middle - started, "decode": now() - middle}
