"""Could SVFT keep one basis a site? ΔW = U M Vᵀ = W V Σ⁻¹ M Vᵀ needs no U, but Σ⁻¹ multiplies what rounding did.

For every linear layer: the condition number σ₁/σ_k, and the error of ΔW x in the model's dtype, against float64, with
two bases and with one; a random banded M. Rows: kinds of layer, worst and median over the model's layers.
"""

import statistics

import torch
from torch import Tensor, nn

from bench.arms import build


def run(given) -> tuple[dict, str]:
    model = build("smollm2", given.attention)
    found: dict[str, list[dict]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            found.setdefault(path.rpartition(".")[2], []).append(errors(module.weight.detach()))
    return found, table(found)


def errors(W: Tensor, band: int = 8, tokens: int = 64) -> dict:
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    g = torch.Generator().manual_seed(0)
    k = len(S)
    M = torch.randn(k, k, generator=g, dtype=torch.float64).triu(-band).tril(band)
    x = torch.randn(tokens, W.shape[1], generator=g).to(W.dtype)
    exact = x.double() @ Vt.T @ M.T @ U.T
    u, vt, m, inner = (t.to(W.dtype) for t in (U, Vt, M, M.T / S))
    two = x @ vt.T @ m.T @ u.T
    one = (x @ vt.T @ inner @ vt) @ W.T
    distance = {"two": two, "one": one}
    return {"condition": (S[0] / S[-1]).item()} | {
        name: ((y.double() - exact).norm() / exact.norm()).item() for name, y in distance.items()
    }


def table(found: dict[str, list[dict]]) -> str:
    lines = ["| layers | σ₁/σ_k: median (worst) | error, two bases | error, one basis |", "| --- | --- | --- | --- |"]
    for name, made in found.items():
        cells = []
        for key, form in (("condition", "{:,.0f}"), ("two", "{:.1%}"), ("one", "{:.1%}")):
            values = [m[key] for m in made]
            cells.append(f"{form.format(statistics.median(values))} ({form.format(max(values))})")
        lines.append(f"| {name} × {len(made)} | {' | '.join(cells)} |")
    return "\n".join(lines)
