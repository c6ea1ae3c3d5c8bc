"""Putting a change on and taking it off again: 1 % of the entries, against a LoRA of rank 32 fused in place.

For square weights alone, and for all linear layers of SmolLM2-135M. "on" keeps what it overwrites, "off" puts it back:
exact for entries, and for a LoRA another product that leaves rounding behind. PEFT's merge is measured beside.
"""

import statistics
import time
import warnings

from bench.arms import build, prepare
from bench.measure import in_process

SIDES, DTYPES, DENSITY, RANK, REPEAT = (576, 1024, 2048, 4096), ("float32", "bfloat16"), 0.01, 32, 20
ARMS = ("entries", "blocks", "LoRA in place", "PEFT")


def run(given) -> tuple[dict, str]:
    found = {f"{side} {dtype}": in_process(tensor, side, dtype, given.threads) for dtype in DTYPES for side in SIDES}
    found |= {f"SmolLM2 {dtype}": in_process(model, dtype, given.threads) for dtype in DTYPES}
    return found, table(found)


def tensor(side: int, dtype: str, threads: int) -> dict[str, float]:
    """Median seconds of on + off, each arm in turn."""
    import peft
    import torch

    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    g = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(side, side, bias=False, dtype=kind)
    W = layer.weight.data
    index = torch.randperm(side * side, generator=g)[: int(DENSITY * side * side)].sort().values
    values = torch.randn(len(index), generator=g).to(kind)
    corners = torch.randperm((side // 32) ** 2, generator=g)[: max(1, int(DENSITY * (side // 32) ** 2))].sort().values
    rows, columns = corners // (side // 32), corners % (side // 32)
    blocks, grid = torch.randn(len(corners), 32, 32, generator=g).to(kind), W.view(side // 32, 32, side // 32, 32)
    B, A = (torch.randn(s, generator=g).to(kind) * 1e-3 for s in ((side, RANK), (RANK, side)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        holder = torch.nn.ModuleDict({"layer": torch.nn.Linear(side, side, bias=False, dtype=kind)})
        rival = peft.get_peft_model(holder, peft.LoraConfig(r=RANK, target_modules=["layer"])).base_model.model["layer"]

    def entries() -> None:
        flat = W.view(-1)
        kept = flat[index]
        flat[index] = kept + values
        flat[index] = kept

    def whole_blocks() -> None:
        kept = grid[rows, :, columns]
        grid[rows, :, columns] = kept + blocks
        grid[rows, :, columns] = kept

    def lora() -> None:
        W.addmm_(B, A)
        W.addmm_(B, A, alpha=-1)

    def theirs() -> None:
        rival.merge()
        rival.unmerge()

    return _in_turn(dict(zip(ARMS, (entries, whole_blocks, lora, theirs), strict=True)))


def model(dtype: str, threads: int) -> dict[str, float]:
    """The same over 210 layers; "merge" is the library's own, which also measures what rounding takes."""
    import torch

    import addenda as ad
    from addenda.core.site.site import site_at

    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    sparse = build("smollm2", dtype=kind)
    adapter = ad.attach(sparse, f"shira:density={DENSITY},mask=random", targets="linear")
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    jobs = []
    for path, t in adapter.sites():
        index, values = t.method.sparse(t.tensors(), (0, 0))
        jobs.append((site_at(sparse, path).weight.data.view(-1), index.long(), values.detach().to(kind)))
    low = build("smollm2", dtype=kind)
    thin = []
    for path, t in ad.attach(low, f"lora:rank={RANK}", targets="linear").sites():
        W = site_at(low, path).weight.data
        thin.append((W, torch.randn(len(W), RANK).to(kind) * 1e-3, t.tensors()["A"].detach().to(kind)))
    rival, _ = prepare("peft/lora", build("smollm2", dtype=kind))

    def entries() -> None:
        kept = [flat[index] for flat, index, _ in jobs]
        for (flat, index, values), old in zip(jobs, kept, strict=True):
            flat[index] = old + values
        for (flat, index, _), old in zip(jobs, kept, strict=True):
            flat[index] = old

    def lora() -> None:
        for W, B, A in thin:
            W.addmm_(B, A)
        for W, B, A in thin:
            W.addmm_(B, A, alpha=-1)

    def theirs() -> None:
        rival.merge_adapter()
        rival.unmerge_adapter()

    def merged() -> None:
        ad.merge(sparse, allow_loss=1.0)
        ad.unmerge(sparse)

    return _in_turn({"entries": entries, "LoRA in place": lora, "PEFT": theirs, "merge": merged})


def _in_turn(arms: dict) -> dict[str, float]:
    import torch

    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    with torch.no_grad():
        for i in range(REPEAT + 2):
            for arm, function in arms.items():
                started = time.perf_counter()
                function()
                if i >= 2:
                    seconds[arm].append(time.perf_counter() - started)
    return {arm: statistics.median(s) for arm, s in seconds.items()}


def table(found: dict[str, dict[str, float]]) -> str:
    lines = ["| weight | entries: on, off | LoRA / entries | PEFT / entries | LoRA / blocks | `ad.merge`, `unmerge` |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for name, made in found.items():
        own = made["entries"]
        blocks = f"{made['LoRA in place'] / made['blocks']:.1f}" if "blocks" in made else ""
        merge = f"{made['merge'] * 1e3:.0f} ms" if "merge" in made else ""
        cells = [name, f"{own * 1e3:.2f} ms", f"{made['LoRA in place'] / own:.1f}", f"{made['PEFT'] / own:.1f}"]
        lines.append(f"| {' | '.join([*cells, blocks, merge])} |")
    return "\n".join(lines)
