"""What an adapter costs when it does not train: merged, switched off, active; and how long a switch takes."""

import statistics
import time

import torch

from bench.arms import build, prepare
from bench.measure import in_process, spread

SPEC = "lora:rank=16"
ARMS = ("base", "merged", "none", "active", "peft active", "peft merged")


def run(given) -> tuple[dict, str]:
    batch, length = map(int, given.tokens.split("x"))
    found = {}
    for name, tokens in (("prefill", (batch, length)), ("one token", (1, 1))):
        found[name] = [in_process(forward, given.model, tokens, given.attention, given.threads)
                       for _ in range(given.rounds)]  # fmt: skip
    return found, table(found, given)


def forward(model_name: str, tokens: tuple[int, int], attention: str, threads: int) -> dict:
    """Seconds of a forward of every arm, in turn in one process on one set of weights; bits compared with the base."""
    import addenda as ad

    torch.set_num_threads(threads)
    ids = torch.randint(0, 1000, tokens, generator=torch.Generator().manual_seed(1))
    model, rival = build(model_name, attention).eval(), build(model_name, attention).eval()
    with torch.no_grad():
        want = model(ids).logits
    merged, _ = prepare(f"ours/{SPEC}", build(model_name, attention).eval())
    prepare(f"ours/{SPEC}", model)
    base = build(model_name, attention).eval()
    rival, _ = prepare("peft/lora", rival)
    for adapted in (model, merged):
        for p in next(iter(ad.adapters(adapted).values())).parameters():
            torch.nn.init.normal_(p, std=0.02)
    ad.merge(merged, allow_loss=1.0)
    ad.detach(merged, keep_merged=True)
    merged_rival, _ = prepare("peft/lora", build(model_name, attention).eval())
    merged_rival = merged_rival.merge_and_unload()  # type: ignore[operator]
    arms = {"base": base, "merged": merged, "active": model, "peft active": rival, "peft merged": merged_rival}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    switches = []
    repeat = 4 if tokens[0] * tokens[1] > 64 else 12
    with torch.no_grad():
        for i in range(repeat + 1):
            for arm in ARMS:
                started = time.perf_counter()
                if arm in ("none", "active"):
                    ad.switch(model, None if arm == "none" else "a0")
                    switches.append(time.perf_counter() - started)
                one = arms["active" if arm == "none" else arm]
                started = time.perf_counter()
                y = one(ids).logits
                if i:
                    seconds[arm].append(time.perf_counter() - started)
                if arm == "none":
                    assert torch.equal(y, want), "switched off, the base's bits"
    sizes = [
        (m.out_features, m.in_features)
        for n, m in base.named_modules()
        if isinstance(m, torch.nn.Linear) and "lm_head" not in n
    ]
    flops = 1 + 16 * sum(m + n for m, n in sizes) / (sum(m * n for m, n in sizes) + base.lm_head.weight.numel())
    return {arm: statistics.median(s) for arm, s in seconds.items()} | {
        "switch": statistics.median(switches),
        "flops": flops,
    }


def table(found: dict, given) -> str:
    lines = [f"{given.model}, LoRA r = 16, {given.tokens} tokens at once or one; ratios to the base's forward.", "",
             "| tokens | base | merged | switched off | active | PEFT active | PEFT merged | FLOP ratio | a switch |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, made in found.items():
        cells = [f"{statistics.median(m['base'] for m in made) * 1e3:.1f} ms"]
        for arm in ARMS[1:]:
            cells.append(spread([m[arm] / m["base"] for m in made]))
        cells += [f"{made[0]['flops']:.3f}", f"{statistics.median(m['switch'] for m in made) * 1e3:.1f} ms"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
