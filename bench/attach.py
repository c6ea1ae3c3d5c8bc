"""Seconds that attaching takes on every linear layer of SmolLM2-135M, method by method."""

from bench.arms import build
from bench.measure import in_process

METHODS = ("lora:rank=16", "pissa:rank=16", "dora:rank=16", "dylora", "vera", "shira", "shira:mask=block",
           "miss", "bat:rank=64", "loldu:rank=64", "oft", "svft:pattern=banded,band=8")  # fmt: skip


def run(given) -> tuple[dict, str]:
    found = {method: in_process(seconds, method, given.threads) for method in METHODS}
    lines = ["| method | seconds |", "| --- | ---: |", *(f"| {m} | {s:.2f} |" for m, s in found.items())]
    return found, "\n".join(lines)


def seconds(method: str, threads: int) -> float:
    import torch

    import addenda as ad

    torch.set_num_threads(threads)
    return ad.attach(build("smollm2"), method).seconds
