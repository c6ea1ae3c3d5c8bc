"""Where the time of one training step goes, by kind of operation: the floor, the peer's LoRA, and some of ours."""

from collections import Counter

from bench.arms import build, prepare, warm
from bench.measure import in_process

ARMS = (
    "floor", "peft/lora", "ours/lora:rank=16", "ours/miss:rank=64", "ours/dora:rank=16",
    "ours/shira:density=0.01,mask=block", "ours/oft:block=32", "ours/hra:rank=8", "ours/boft:block=8,levels=2",
    "ours/c3a:block=64", "ours/fourierft:frequencies=1000", "ours/randlora:rank=32",
)  # fmt: skip
STEPS = 4
THIN = 64  # a product with a side of at most this is a thin one
COPIES = ("aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::cat", "aten::fill_", "aten::zero_")
VIEWS = ("aten::view", "aten::reshape", "aten::t", "aten::transpose", "aten::expand", "aten::as_strided", "aten::slice")


def run(given) -> tuple[dict, str]:
    batch, length = map(int, given.tokens.split("x"))
    found = {arm: in_process(milliseconds, given.model, arm, (batch, length), given.attention, given.threads)
             for arm in ARMS}  # fmt: skip
    kinds = sorted({k for made in found.values() for k in made}, key=lambda k: (-found["floor"].get(k, 0), k))
    lines = [f"{given.model}, bfloat16, {given.tokens} tokens; milliseconds a step on the calling thread.", "",
             f"| | {' | '.join(kinds)} | all |", f"| --- |{' ---: |' * (len(kinds) + 1)}"]  # fmt: skip
    for arm, made in found.items():
        cells = [*(made.get(kind, 0.0) for kind in kinds), sum(made.values())]
        lines.append(f"| {arm} | {' | '.join(f'{c:.0f}' for c in cells)} |")
    return found, "\n".join(lines)


def milliseconds(model_name: str, arm: str, tokens: tuple[int, int], attention: str, threads: int) -> dict[str, float]:
    """Time on the calling thread, which waits for the others in every kernel, by kind of operation."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(threads)
    model = build(model_name, attention)
    batch = torch.randint(0, model.config.vocab_size, tokens, generator=torch.Generator().manual_seed(1))
    warm(model)
    model, _ = prepare(arm, model)
    live = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(live, lr=1e-4, fused=True) if live else None

    def step() -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as made:
        for _ in range(STEPS):
            step()
    found: Counter[str] = Counter()
    for event in made.key_averages(group_by_input_shape=True):
        found[_kind(event.key, event.input_shapes)] += event.self_cpu_time_total / 1e3 / STEPS
    return dict(found)


def _kind(name: str, shapes: list) -> str:
    if name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"):
        sides = [side for shape in shapes for side in shape if isinstance(side, int)]
        return "thin products" if sides and min(sides) <= THIN else "dense products"
    if "attention" in name:
        return "attention"
    if "fft" in name or "linalg" in name:
        return "transforms and solves"
    if "adam" in name:
        return "optimizer"
    if name in COPIES:
        return "casts and copies"
    if name.startswith("aten::") and name not in VIEWS:
        return "element-wise and reductions"
    return "Python, autograd and views"
