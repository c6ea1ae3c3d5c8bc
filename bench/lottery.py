"""Lottery-ticket fine-tuning: what choosing K of all numbers takes in memory, and what its changes cost in a forward.

An encoder that a package carries (`--model`: minilm by default, or e5). The peak of choosing is that of the process's
resident memory above what is there with the trained copies, over the parameters' bytes. Forwards are of 100 documents
in batches of 20, each of 64 tokens; arms take turns, and times are of the processor, as other programs may run.
"""

import gc
import statistics
import time

from bench.measure import in_process

SHARES, DOCUMENTS, BATCH, LENGTH, DENSITY = (0.0, 0.01, 0.04, 1.0), 100, 20, 64, 0.04
ARMS = ("base", "one", "two", "merged")


def run(given) -> tuple[dict, str]:
    name = "minilm" if given.model == "llama94m" else given.model
    found = {"model": name, "selection": in_process(selection, name, given.threads)}
    found["times"] = in_process(seconds, name, given.threads, given.rounds)
    lines = [f"{name}, {found['selection']['numbers']:,} numbers.", "",
             "| K | seconds | peak / bytes of the parameters |", "| ---: | ---: | ---: |"]  # fmt: skip
    for row in found["selection"]["rows"]:
        lines.append(f"| {row['k']:,} | {row['seconds']:.2f} | {row['peak']:.2f} |")
    lines += ["", "| 100 documents | milliseconds | of the base's |", "| --- | ---: | ---: |"]
    for arm in ARMS:
        ratios = [t / b for t, b in zip(found["times"][arm], found["times"]["base"], strict=True)]
        says = {"base": "base", "one": "one sparse", "two": "two sparse", "merged": "two, merged"}[arm]
        lines.append(
            f"| {says} | {statistics.median(found['times'][arm]) * 1e3:.0f} | {statistics.median(ratios):.3f} |"
        )
    lines += ["", f"Sparse: {DENSITY:.0%} of all numbers each, drawn from all."]
    return found, "\n".join(lines)


def _model(name: str, threads: int):
    import torch

    from addenda.models.encoders import encoder_named
    from addenda.models.pretrained import pretrained

    torch.set_num_threads(threads)
    return pretrained("AutoModel", encoder_named(name).setup()).eval()


def selection(name: str, threads: int) -> dict:
    import torch

    import addenda as ad
    from addenda.core.site.site import site_at
    from addenda.models.machine import Peak, resident
    from addenda.train.most_changed import Trained, most_changed

    model = _model(name, threads)
    adapter = ad.attach(model, "full", targets="weights")
    trained = []
    with torch.no_grad():
        for path, t in adapter.sites():
            value = t.get_parameter("value")
            for row in value.view(len(value), -1).split(
                1 << 10
            ):  # little by little: the peak is to be that of choosing
                row.add_(torch.randn_like(row), alpha=1e-3)
            trained.append(Trained(path, value.detach(), site_at(model, path).matrix))
    numbers = sum(t.size for t in trained)
    rows = []
    most_changed(trained[:1], 1)  # what torch makes once
    for share in SHARES:
        k = max(1, round(share * numbers))
        gc.collect()
        before, started = resident() or 0, time.process_time()
        with Peak() as peak:
            found = most_changed(trained, k)
        took = time.process_time() - started
        assert sum(map(len, found.values())) == k
        rows.append({"k": k, "seconds": took, "peak": ((peak.bytes or 0) - before) / (4 * numbers)})
        del found
    return {"numbers": numbers, "rows": rows}


def seconds(name: str, threads: int, rounds: int) -> dict[str, list[float]]:
    import torch

    import addenda as ad
    from addenda.core.site.site import site_at
    from addenda.train.lottery import maskable
    from addenda.train.most_changed import at_random

    model = _model(name, threads)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (DOCUMENTS, LENGTH), generator=g)
    sizes = {p: site_at(model, p).weight.numel() for p in maskable(model)}
    for seed, which in enumerate(("language", "task")):
        positions = at_random(sizes, round(DENSITY * sum(sizes.values())), seed)
        adapter = ad.attach(model, "sparse", positions=positions, name=which)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(torch.randn(p.shape, generator=g), alpha=1e-3)

    def forward() -> float:
        started = time.process_time()
        with torch.no_grad():
            for batch in ids.split(BATCH):
                model(input_ids=batch)
        return time.process_time() - started

    acting = {"base": None, "one": "task", "two": ["language", "task"], "merged": ["language", "task"]}
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for i in range(rounds + 1):
        for arm in ARMS:
            ad.switch(model, acting[arm])
            if arm == "merged":
                ad.merge(model, allow_loss=1.0)
            took = forward()
            if arm == "merged":
                ad.unmerge(model)
            if i:  # the first round warms up
                found[arm].append(took)
    return found
