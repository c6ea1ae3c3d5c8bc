"""Exported adapters as vLLM serves them, beside what they compute here: log-probabilities, and folders that are wrong.

    ADDENDA_VLLM_PYTHON=/path/to/python python -m bench served --out records/bench

The Python named there has vLLM (`tests/exporting/vllm_environment.sh` makes it); it runs `vllm_server.py` once for each
model. All trained tensors are moved at random first, so that a reading that does nothing would be seen.
"""

import json
import os
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import addenda as ad
from addenda.core.adapter.attach import detach
from addenda.core.adapter.handle import Adapter
from bench.served_folders import FOLDERS, MOST, STRICTER, VOCABULARY, WIDTH, make

ENVIRONMENT = "ADDENDA_VLLM_PYTHON"
SERVER = Path(__file__).parents[1] / "tests" / "exporting" / "vllm_server.py"
IDS = [[5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60], [7, 3, 71, 12, 9]]


@dataclass(frozen=True)
class Case:
    """An adapter to serve. attach: put it on the model; options: of the export."""

    name: str
    attach: Callable[[nn.Module], Adapter]
    options: dict[str, Any]


def _attach(method: Any, targets: Any = "linear", **options: Any) -> Callable[[nn.Module], Adapter]:
    return lambda model: ad.attach(model, method, targets=targets, name="served", **options)


_MIXED: dict[Any, Any] = {"attention": ad.LoRA(rank=2, alpha=6), "mlp": ad.LoRA(rank=5, alpha=3)}
CASES = (
    Case("lora", lambda m: ad.attach(m, ad.LoRA(rank=4, alpha=8), targets="linear", name="served"), {}),
    Case("rslora", _attach(ad.LoRA(rank=4, alpha=8, scaling="rs")), {}),
    Case("ranks and alphas that differ", lambda m: ad.attach(m, _MIXED, name="served"), {}),
    Case("the same, padded to one rank", lambda m: ad.attach(m, _MIXED, name="served"), {"uniform": True}),
    Case("pissa", _attach(ad.LoRA(rank=2, alpha=4, origin="pissa")), {}),
    Case("loha", _attach(ad.LoHa(rank=2)), {}),
    Case("oft, nearest of rank 8", _attach(ad.OFT(block=8)), {"rank": 8}),
)
OUTER = Case(
    "embedding and head", _attach(ad.LoRA(rank=4, alpha=8), ["model.embed_tokens", "lm_head", "attention"]), {}
)
TIED = Case("an embedding that is the head", _attach(ad.LoRA(rank=4), ["model.embed_tokens.weight", "attention"]), {})
HEADS = (
    Case("a head as a whole", _attach(ad.LoRA(rank=4, alpha=8), "linear", also_train=["score"]), {}),
    Case("a head's LoRA", _attach(ad.LoRA(rank=2, alpha=6), ["score", "attention"]), {}),
)


def python() -> str | None:
    """Return the Python that has vLLM, as the environment says; None where it says none."""
    return os.environ.get(ENVIRONMENT) or None


def serve(model: Path, adapters: dict[str, Path], rank: int = 16, ids: Any = None, **more: Any) -> dict[str, Any]:
    """Return what vLLM, in its own process, answers with the base and with each adapter (see `vllm_server.py`)."""
    with tempfile.TemporaryDirectory() as folder:
        job, out = Path(folder) / "job.json", Path(folder) / "out.json"
        named = {name: str(path) for name, path in adapters.items()}
        job.write_text(
            json.dumps(
                {"model": str(model), "ids": ids or IDS, "adapters": named, "rank": rank, "out": str(out), **more}
            )
        )
        run = subprocess.run([str(python()), str(SERVER), str(job)], capture_output=True, text=True, check=False)
        if not out.exists():
            raise RuntimeError(f"vLLM gave no answer (exit code {run.returncode}): {run.stderr[-2000:]}")
        return json.loads(out.read_text())


def llama(kind: str = "LlamaForCausalLM", **options: Any) -> Any:
    """Return a tiny LLaMA whose heads are as wide (32) as vLLM's kernels of the CPU want them."""
    import transformers

    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2, "tie_word_embeddings": False}
    torch.manual_seed(0)
    all_options: dict[str, Any] = sizes | heads | tokens | options
    return getattr(transformers, kind)(transformers.LlamaConfig(**all_options)).eval()


def moved(adapter: Adapter, scale: float = 0.15) -> Adapter:
    """Move every trained tensor at random, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for _, tensors in adapter.sites():
            for p in tensors.parameters():
                p.add_(torch.randn_like(p), alpha=scale)
    return adapter


@torch.no_grad()
def here(model: nn.Module, ids: Iterable[list[int]]) -> list[Tensor]:
    """Return by prompt what this process computes: log-probabilities after each token but the last, or logits."""
    outputs = [model(input_ids=torch.tensor([row])).logits[0] for row in ids]
    return [o if o.dim() == 1 else o.log_softmax(-1)[:-1] for o in outputs]


def difference(answer: dict[str, Any], expected: list[Tensor]) -> float:
    """Return the largest difference of vLLM's answer from these numbers, where it tells them (its top tokens)."""
    largest = 0.0
    for row, want in zip(answer["values"], expected, strict=True):
        if want.dim() == 1:
            largest = max(largest, float((torch.tensor(row) - want).abs().max()))
            continue
        for at, logs in zip(row, want, strict=True):
            index = torch.tensor([int(i) for i in at])
            largest = max(largest, float((torch.tensor(list(at.values())) - logs[index]).abs().max()))
    return largest


def between(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference of two answers of vLLM, of tokens that both tell."""
    if not isinstance(one["values"][0][0], dict):
        return float((torch.tensor(one["values"]) - torch.tensor(other["values"])).abs().max())
    pairs = [(a, b) for r, s in zip(one["values"], other["values"], strict=True) for a, b in zip(r, s, strict=True)]
    found = torch.tensor([a[k] - b[k] for a, b in pairs for k in a.keys() & b.keys()]).abs()
    return float(found.max()) if not bool(found.isnan().any()) else float("nan")


def exported(
    model: nn.Module, cases: Iterable[Case], folder: Path, ids: Any = None, scale: float = 0.15
) -> dict[str, dict[str, Any]]:
    """Export each case, moved by `scale`, and return by name its "folder", "expected" numbers, and how far it moves."""
    found = {}
    for case in cases:
        adapter = moved(case.attach(model), scale)
        place = folder / case.name.replace(" ", "-").replace(",", "")
        report = ad.export(adapter, "vllm", place, **case.options)
        if not report.exact:  # what was written is compared, not what it comes near to
            detach(model, "served")
            ad.import_adapter(model, place, name="served")
        found[case.name] = {
            "folder": place,
            "expected": here(model, ids or IDS),
            "relative": report.effect.moved / report.effect.size,
            "error": max(report.errors.values()),
        }
        detach(model, "served")
    return found


def compared(
    base: Path, alone: list[Tensor], made: dict[str, dict[str, Any]], ids: Any = None, **more: Any
) -> dict[str, Any]:
    """Return by case how far vLLM's answers are from ours, and from its own of the base; and its versions.

    alone: what the base computes here, which says how far the two differ without any adapter.
    """
    out = serve(base, {name: m["folder"] for name, m in made.items()}, ids=ids, **more)
    answers, rows = out["answers"], {}
    of_base = difference(answers["base"], alone)
    for name, m in made.items():
        if "error" in answers[name]:
            raise RuntimeError(f"vLLM refused {name}: {answers[name]['error']}")
        rows[name] = {
            "difference": difference(answers[name], m["expected"]),
            "of the base alone": of_base,
            "from base": between(answers[name], answers["base"]),
            "moved": m["relative"],
            "error of ΔW": m["error"],
        }
    return {"versions": out["versions"], "cases": rows}


def tiny(folder: Path) -> dict[str, Any]:
    """Return the comparison of the cases on tiny LLaMAs: untied, tied, and a classifier of three labels."""
    found: dict[str, Any] = {"cases": {}}
    models = (
        ("untied", llama(), (*CASES, OUTER), {}),
        ("tied", llama(tie_word_embeddings=True), (TIED,), {}),
        ("classifier", llama("LlamaForSequenceClassification", num_labels=3), HEADS, {"pooling": True}),
    )
    for name, model, cases, more in models:
        model.save_pretrained(folder / name)
        rows = compared(folder / name, here(model, IDS), exported(model, cases, folder / f"{name}-adapters"), **more)
        found = {"versions": rows["versions"], "cases": found["cases"] | rows["cases"]}
    return found


def smollm2(folder: Path) -> dict[str, Any]:
    """Return the comparison on SmolLM2-135M in float32: two exact cases and one that is reduced."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    from addenda.models.embedded import model_folder

    base = model_folder()
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    text = "The quick brown fox jumps over the lazy dog, and then it goes home to sleep."
    ids = [AutoTokenizer.from_pretrained(base)(text)["input_ids"]]
    cases = (
        Case("lora, r = 8", _attach(ad.LoRA(rank=8, alpha=16)), {}),
        Case("ranks and alphas that differ", lambda m: ad.attach(m, _MIXED, name="served"), {"uniform": True}),
        Case("loha, r = 3", _attach(ad.LoHa(rank=3)), {}),
    )
    made = exported(model, cases, folder, ids, scale=0.03)
    alone = here(model, ids)
    del model
    return compared(base, alone, made, ids=ids, top=20)


def wrong(folder: Path) -> dict[str, dict[str, Any]]:
    """Return by wrong folder what vLLM does with it, and what `check` says of it."""
    from addenda.exporting.vllm import check

    model = llama()
    model.save_pretrained(folder / "base")
    good = folder / "good"
    ad.export(moved(ad.attach(model, ad.LoRA(rank=4, alpha=8), targets="linear", name="served")), "vllm", good)
    places = {w.name: make(good, w, folder / str(i)) for i, w in enumerate((*FOLDERS, *STRICTER))}
    answers = serve(folder / "base", places, rank=MOST)["answers"]
    rows = {}
    for w in (*FOLDERS, *STRICTER):
        answer = answers[w.name]
        if "error" in answer:
            does = "refused"
        elif between(answer, answers["base"]) == 0:
            does = "base"
        else:
            does = "alike" if between(answer, answers["good"]) == 0 else "otherwise"
        found = check(places[w.name], max_lora_rank=MOST, config=model) or [""]
        words = (answer.get("error", ""), found[0])
        said, told = (text.replace(str(folder), "…")[:200] for text in words)
        rows[w.name] = {"vllm": does, "said": said, "check": told}
    return rows


def run(given: Namespace) -> tuple[dict[str, Any], str]:
    """Return the record and its table."""
    if python() is None:
        raise SystemExit(f"{ENVIRONMENT} names no Python with vLLM; tests/exporting/vllm_environment.sh makes one.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            "tiny": tiny(folder / "tiny"),
            "smollm2": smollm2(folder / "smollm2"),
            "wrong": wrong(folder / "wrong"),
        }
    lines = [
        "| model | adapter | difference | of the base alone | vLLM with it, from its base |",
        "|---|---|--:|--:|--:|",
    ]
    for model in ("tiny", "smollm2"):
        for case, row in found[model]["cases"].items():
            numbers = f"{row['difference']:.1e} | {row['of the base alone']:.1e} | {row['from base']:.2f}"
            lines.append(f"| {model} | {case} | {numbers} |")
    lines += ["", "| folder | vLLM | check |", "|---|---|---|"]
    lines += [f"| {case} | {row['vllm']} | {row['check'] or 'nothing'} |" for case, row in found["wrong"].items()]
    return found, "\n".join(lines)
