"""32 examples through 32 adapters, of low rank or of scales: `per_example` against a loop, forward and a step."""

import statistics
import time

from bench.arms import build
from bench.measure import in_process

EXAMPLES, LENGTH, REPEAT = 32, 32, 5
METHODS = ("lora:rank=8", "ia3")


def run(given) -> tuple[dict, str]:
    found = {}
    for method in METHODS:
        made = in_process(seconds, given.model, method, given.attention, given.threads)
        found |= {f"{method}, {what}": times for what, times in made.items()}
    lines = [f"{given.model}, {EXAMPLES} examples of {LENGTH} tokens, {EXAMPLES} adapters.", "",
             "| | one adapter for all | an adapter each | a loop | of the loop's time | difference of outputs |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for what, made in found.items():
        times = [f"{made[k] * 1e3:.0f} ms" for k in ("one", "each", "loop")]
        error = f"{made['error']:.1e}" if "error" in made else ""
        lines.append(f"| {what} | {' | '.join(times)} | {made['each'] / made['loop']:.2f} | {error} |")
    return found, "\n".join(lines)


def seconds(model_name: str, method: str, attention: str, threads: int) -> dict[str, dict[str, float]]:
    import torch

    import addenda as ad

    torch.set_num_threads(threads)
    model = build(model_name, attention, dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    names = [f"user{i}" for i in range(EXAMPLES)]
    for i, name in enumerate(names):
        adapter = ad.attach(model, method, name=name, seed=i)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(torch.randn_like(p), alpha=0.02)

    def one():
        ad.switch(model, names[0])
        return model(ids).logits

    def each():
        with ad.per_example(model, names):
            return model(ids).logits

    def loop():
        out = []
        for x, name in zip(ids, names, strict=True):
            ad.switch(model, name)
            out.append(model(x[None]).logits)
        return torch.cat(out)

    found: dict[str, dict[str, float]] = {}
    for what, training in (("forward", False), ("forward and backward", True)):
        times: dict[str, list[float]] = {"one": [], "each": [], "loop": []}
        for i in range(REPEAT + 1):
            for arm, function in (("one", one), ("each", each), ("loop", loop)):
                started = time.perf_counter()
                with torch.set_grad_enabled(training):
                    y = function()
                    if training:
                        y.square().mean().backward()
                if i:
                    times[arm].append(time.perf_counter() - started)
        found[what] = {arm: statistics.median(s) for arm, s in times.items()}
    with torch.no_grad():
        want, got = loop(), each()
        found["forward"]["error"] = float((got - want).norm() / want.norm())
    return found
