"""How near llama.cpp with an exported adapter is to the live one: tiny models of every architecture, and SmolLM2.

ADDENDA_LLAMA_PYTHON names the Pythons that have llama.cpp (tests/gguf_base.py says how they are made). Every adapter
is moved at random and exported as GGUF; logits are compared by ‖theirs − ours‖ / ‖ours‖, and by the largest difference
of the largest logit, beside those of the base alone, which is written in float32 for this. A base in 8 bits shows what
the base itself costs.
"""

import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

TEXT = (
    "def mean(values):\n    return sum(values) / len(values)\n\nThe quick brown fox jumps over the lazy dog, and "
    "the cat looks on. In 1905 a clerk in Bern wrote four papers; one of them was on Brownian motion.\n"
)
LEAST = 0.05  # of the largest logit: what an adapter changes at least
SMOL = {  # name -> method, rank of the export where it is no LoRA
    "lora": ("lora:rank=8,alpha=16", None),
    "lora, rank 4": ("lora:rank=4", None),
    "rslora": ("rslora:rank=8", None),
    "vera": ("vera:rank=64", None),
    "loha, all of its rank": ("loha:rank=3", 9),
    "oft, rank 16 of it": ("oft:block=32", 16),
}


def run(given) -> tuple[list[dict], str]:
    from tests import gguf_base as llama

    torch.set_num_threads(given.threads)
    found = []
    engines = {llama.engine_and_version(python): python for python in llama.pythons()}
    if not engines:
        raise SystemExit("ADDENDA_LLAMA_PYTHON names no Python with llama.cpp.")
    with tempfile.TemporaryDirectory() as folder:
        for row in (*_tiny(llama, engines, Path(folder)), *_smollm2(llama, engines, Path(folder))):
            found.append(row)
            print(row, flush=True)
    return found, table(found)


def _tiny(llama, engines: dict[str, str], folder: Path) -> Iterator[dict]:
    """Every architecture with an adapter at every name that the engine takes."""
    from addenda.exporting.gguf.architectures import architecture_of

    for kind in llama.KINDS:
        model = llama.make(kind)
        base, wanted = llama.write_base(model, folder / f"{kind}.gguf"), llama.logits(model)
        a = architecture_of(model.config)
        named = {p: t for p, _ in model.named_modules() if (t := a.tensor(p)) and not a.tied(t, model.config)}
        for engine, python in engines.items():
            taken = [p for p, t in named.items() if not engine.startswith("ik ") or t != "token_embd.weight"]
            file, live = _exported(
                llama, model, "lora:rank=8,alpha=16", taken, None, folder / f"{kind}-{engine}-a.gguf"
            )
            row = {"base": kind, "adapter": "lora at every name", "engine": engine, "names": len(taken)}
            try:
                theirs = llama.run(python, base, [file])
            except RuntimeError:
                yield row | {"alone": None}
                continue
            yield row | _apart(llama, theirs, wanted, [live])[0]


def _smollm2(llama, engines: dict[str, str], folder: Path) -> Iterator[dict]:
    """The embedded model: methods, mixed ranks, what no permutation costs, and a base in 8 bits."""
    from addenda.models.embedded import model_folder
    from addenda.models.load import load_model

    loaded = load_model(model_folder(), task="causal", dtype="float32")
    model, tokens = loaded.model.eval(), loaded.tokenizer(TEXT)["input_ids"]
    base, wanted = llama.write_base(model, folder / "smollm2.gguf"), llama.logits(model, tokens)
    arms = {name: _exported(llama, model, method, "linear", rank, folder / f"{i}.gguf", tokens)
            for i, (name, (method, rank)) in enumerate(SMOL.items())}  # fmt: skip
    mixed = {"*.q_proj": "lora:rank=2,alpha=8", "*.v_proj": "lora:rank=16", "*.up_proj": "lora:rank=5"}
    arms["lora, mixed ranks"] = _exported(llama, model, mixed, None, None, folder / "mixed.gguf", tokens)
    for engine, python in engines.items():
        theirs = llama.run(python, base, [file for file, _ in arms.values()], tokens)
        rows = _apart(llama, theirs, wanted, [live for _, live in arms.values()])
        for name, row in zip(arms, rows, strict=True):
            yield {"base": "SmolLM2-135M-Instruct", "adapter": name, "engine": engine} | row
    file, live = _exported(llama, model, "lora:rank=8", ["*.q_proj", "*.k_proj"], None, folder / "qk.gguf", tokens)
    plain = _unpermuted(model, file, folder / "plain.gguf")
    for engine, python in engines.items():
        rows = _apart(llama, llama.run(python, base, [file, plain], tokens), wanted, [live, live])
        for name, row in zip(("lora of q and k", "the same, rows not permuted"), rows, strict=True):
            yield {"base": "SmolLM2-135M-Instruct", "adapter": name, "engine": engine} | row
    for ik in (python for engine, python in engines.items() if engine.startswith("ik ")):
        eight = _quantised(ik, base, folder / "smollm2-q8.gguf")
        file, live = arms["lora"]
        for engine, python in engines.items():
            (row,) = _apart(llama, llama.run(python, eight, [file], tokens), wanted, [live])
            yield {"base": "SmolLM2-135M-Instruct, Q8_0", "adapter": "lora", "engine": engine} | row


def _exported(
    llama, model: nn.Module, method, targets, rank: int | None, path: Path, tokens=None
) -> tuple[Path, object]:
    """An adapter's file and the logits of what it says: with it live, or with its product where that is less."""
    import addenda as ad
    from addenda.exporting.gguf.write import write_adapter
    from addenda.exporting.pairs import low_rank

    tokens = llama.TOKENS if tokens is None else tokens
    adapter, base = ad.attach(model, method, targets=targets, name="bench"), llama.logits(model, tokens)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.01)
        while llama.apart(llama.logits(model, tokens), base) < LEAST:
            for p in adapter.parameters():
                p.mul_(1.3)
    pairs = low_rank(adapter, rank=rank)
    started = time.perf_counter()
    write_adapter(adapter, path, pairs)
    print(f"written in {time.perf_counter() - started:.2f} s, {path.stat().st_size:,} bytes", flush=True)
    live = llama.logits(model, tokens)
    ad.detach(model, "bench")
    if max(p.error for p in pairs.values()) > 1e-5:
        kept = {p: pair.site.module.weight.detach().clone() for p, pair in pairs.items()}
        with torch.no_grad():
            for pair in pairs.values():
                pair.site.module.weight += pair.B @ pair.A
            live = llama.logits(model, tokens)
            for p, pair in pairs.items():
                pair.site.module.weight.copy_(kept[p])
    return path, live


def _unpermuted(model: nn.Module, file: Path, path: Path) -> Path:
    """The same adapter with rows in the order of transformers: what a writer without the permutation would write."""
    import gguf

    from addenda.exporting.gguf.architectures import architecture_of
    from addenda.exporting.gguf.read import read

    w = gguf.GGUFWriter(path, "llama")
    w.add_type(gguf.GGUFType.ADAPTER)
    w.add_string(gguf.Keys.Adapter.TYPE, "lora")
    for where, (_, p) in read(file, model).sites.items():
        tensor = architecture_of(model.config).tensor(where)
        w.add_tensor(f"{tensor}.lora_a", p["A"].contiguous().numpy())
        w.add_tensor(f"{tensor}.lora_b", p["B"].contiguous().numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def _quantised(python: str, base: Path, path: Path) -> Path:
    """The base in 8 bits, by the program that ik-llama-cpp-python ships."""
    code = (
        "import ik_llama_cpp, pathlib; print(pathlib.Path(ik_llama_cpp.__file__).with_name('bin') / 'llama-quantize')"
    )
    program = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1]
    subprocess.run([program, str(base), str(path), "Q8_0"], capture_output=True, check=True)
    return path


def _apart(llama, theirs, wanted, lives) -> list[dict]:
    """Of every adapter: how far the base alone is, how far it is with the adapter, and what the adapter changes."""
    alone = {"alone": llama.far(theirs[0], wanted), "largest alone": llama.apart(theirs[0], wanted)}
    return [
        {**alone, "adapted": llama.far(found, live), "largest adapted": llama.apart(found, live)}
        | {"moved": llama.far(live, wanted)}
        for found, live in zip(theirs[1:], lives, strict=True)
    ]


def table(found: list[dict]) -> str:
    """The record as a page shows it."""
    lines = [
        "| base | adapter | engine | base alone | with the adapter | the adapter changes |",
        "|---|---|---|--:|--:|--:|",
    ]
    for r in found:
        head = f"| {r['base']} | {r['adapter']} | {r['engine']} |"
        if r["alone"] is None:
            lines.append(f"{head} stops | | |")
        else:
            numbers = [f"{r[k]:.1e} ({r[f'largest {k}']:.1e})" for k in ("alone", "adapted")]
            lines.append(f"{head} {' | '.join(numbers)} | {r['moved']:.1%} |")
    return "\n".join(lines)
