"""Parameters trained as whole copies: modules_to_save and bias of any PEFT type, and LN_TUNING.

PEFT copies whole modules: what was not trained in them is written as it is in the base. Biases of modules that it wraps
it trains in place (bias="all"), and stores them under "….base_layer.bias". A folder whose embeddings were changed or
resized holds these too, without naming them.
"""

import re
from collections.abc import Container, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.method.contract import Method, Replace
from addenda.core.modules.ours import is_ours
from addenda.core.site.site import Site, is_norm, owners_of, site_at
from addenda.exporting.install import Forms
from addenda.exporting.peft.conversion import Config, Conversion, Live, Saved, Written, refuse
from addenda.exporting.routes import Route
from addenda.methods.ln import LNTuning

_BASE = ".base_layer"


def names_of(config: Config) -> list[str]:
    """Return modules_to_save. Raises AddendaError where it is no list of names."""
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise AddendaError(f"modules_to_save of a PEFT config is a list of names, got {str(names)[:80]!r}.")
    return names


def read(model: nn.Module, config: Config, copies: Mapping[str, Tensor], forms: Forms) -> list[str]:
    """Put what was trained whole into `forms`; return what does not fit.

    copies: by path in the folder. What is there as the base has it (tables beside their adapters, buffers) is left out.
    """
    names, problems, owners = names_of(config), [], owners_of(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers())
    embeddings = _embeddings(model)
    given: dict[int, dict[str, Tensor]] = {}
    for key, tensor in copies.items():
        path = key.replace(f"{_BASE}.", ".")
        module = path.rpartition(".")[0]
        named = any(re.search(rf"(^|[.]).*{re.escape(n)}([.]|$)", module) for n in names)
        bias = path.endswith("bias") and config.get("bias", "none") not in ("none", None, False)
        known = parameters.get(path, buffers.get(path))
        if not (named or bias or module in embeddings):
            problems.append(f"{key} is no tensor of this type, and the config's modules_to_save does not name it")
        elif known is None:
            problems.append(f"the model has no {path}.{nearest(path, parameters, 1)}")
        elif known.shape != tensor.shape:
            grown = " (the vocabulary was resized)" if module in embeddings else ""
            problems.append(f"{path} is {list(tensor.shape)}, and the model's {list(known.shape)}{grown}")
        elif path in buffers:
            if not torch.equal(known.cpu(), tensor.to(known.dtype)):
                problems.append(f"{path} is a buffer and differs from the model's; an adapter holds parameters")
        elif named or not _equal(known, tensor):
            given.setdefault(id(known), {})[path] = tensor
    for holder, by_path in given.items():
        expected = [f"{p}.{n}" if p else n for p, _, n in owners[holder]]
        first = next(iter(by_path.values()))
        if len(by_path) < len(expected) or any(not torch.equal(first, t) for t in by_path.values()):
            problems.append(
                f"{' and '.join(expected)} share a weight, and the adapter trains {', '.join(by_path)} apart. Untie "
                "them first (model.config.tie_word_embeddings = False, and a copy of the weight)"
            )
        else:
            forms.heads[expected[0]] = {"value": first}
    return problems + _absent(model, names, copies)


def _absent(model: nn.Module, names: Iterable[str], copies: Iterable[str]) -> list[str]:
    """Return the modules of these names that the model has, and that the folder has no tensors of."""
    have, problems = [c.replace(f"{_BASE}.", ".") for c in copies], []
    for path, module in model.named_modules():
        hit = any(path == n or path.endswith(f".{n}") for n in names)
        if hit and any(True for _ in module.parameters()) and not any(c.startswith(f"{path}.") for c in have):
            problems.append(f"the config's modules_to_save names {path}, which has no tensors")
    return problems


def _embeddings(model: nn.Module) -> set[str]:
    """Return the paths of input and output embeddings, whose tables PEFT stores without naming them."""
    found = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, get)())
        except (AttributeError, NotImplementedError):
            continue
    return {path for path, m in model.named_modules(remove_duplicate=False) if any(m is f for f in found)}


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same in the coarser one's dtype."""
    dtype = min(one.dtype, other.dtype, key=lambda d: d.itemsize)
    return torch.equal(one.detach().cpu().to(dtype), other.to(dtype))


def parameter_path(site: Site) -> str:
    """Return the path of the parameter that a site changes."""
    return site.path if site.kind.name == "parameter" else f"{site.path}.{site.parameter}"


def add(made: Written, root: nn.Module, values: Mapping[str, Tensor], heads: Iterable[str] = ()) -> None:
    """Add trained copies (by path of the parameter) to a folder that is being written.

    heads: names of modules that PEFT saves for the folder's task, whether they were trained or not. Raises AddendaError
    for parameters that PEFT has no place for.
    """
    owners, parameters = owners_of(root), dict(root.named_parameters(remove_duplicate=False))
    trained, tied = {}, []
    for path, value in values.items():
        holders = owners[id(parameters[path])]
        tied += [module for _, module, _ in holders[1:]]
        for p, _, n in holders:
            trained[f"{p}.{n}" if p else n] = value
    wrapped = made.modules if isinstance(made.modules, list) else []
    lora = made.config.get("peft_type") == "LORA"
    biases = {p for p in trained if p.endswith(".bias") and _alone(p.removesuffix(".bias"), trained, wrapped, lora)}
    names = _owners([p for p in trained if p not in biases], heads)
    modules = [
        p for p, m in root.named_modules() if any(p.endswith(n) for n in names) and any(True for _ in m.parameters())
    ]
    problems = [f"{p} is a parameter of the model itself" for p in trained if "." not in p]
    problems += [
        f"PEFT would copy {module} as a whole, and {w} in it is changed otherwise"
        for module in modules for w in wrapped if w == module or w.startswith(f"{module}.")
    ]  # fmt: skip
    problems += [f"{p}: {made.config.get('peft_type')} trains no biases in place" for p in biases if not lora]
    if problems:
        raise AddendaError(
            f"{len(problems)} trained copies have no place in PEFT: {'; '.join(problems[:6])}. Export to 'merged'."
        )
    for path in modules:
        module = root.get_submodule(path)
        for name, t in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
            if not is_ours(f"{path}.{name}"):
                made.tensors[f"{path}.{name}"] = trained.get(f"{path}.{name}", t).detach()
    if names:
        made.config["modules_to_save"] = names
    for path in biases:
        module = path.removesuffix(".bias")
        if f"{module}.bias" not in made.tensors:
            made.tensors[f"{module}{_BASE if module in wrapped else ''}.bias"] = trained[path].detach()
            made.config["bias"] = "all"
    if tied and all(isinstance(m, nn.Linear) for m in tied):  # PEFT makes a Linear of what it ties to an embedding
        made.config["ensure_weight_tying"] = True


def _alone(module: str, trained: Container[str], wrapped: Container[str], lora: bool) -> bool:
    """Return whether a bias is trained in place: of a wrapped module always, of others where the weight is not."""
    return module in wrapped or (lora and f"{module}.weight" not in trained)


def _owners(paths: Iterable[str], heads: Iterable[str]) -> list[str]:
    """Return the heads and the modules that own these parameters; none in another, as PEFT loads no copy in a copy."""
    found = dict.fromkeys([*heads, *(p.rpartition(".")[0] for p in paths)])
    return [m for m in found if not any(m.startswith(f"{other}.") for other in found)]


class NormConversion(Conversion):
    """LN_TUNING: copies of norms, and of any other module that it names."""

    type = "LN_TUNING"
    suffixes = ("ln_tuning_layers.weight", "ln_tuning_layers.bias")

    def place(
        self, model: nn.Module, config: Config, sites: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[list[Saved], list[str], list[str]]:
        saved, missing, problems, owners = [], [], [], owners_of(model)
        for path, tensors in sites.items():
            for name, tensor in tensors.items():
                try:
                    site = site_at(model, f"{path}.{name.rpartition('.')[2]}", owners)
                except AddendaError:
                    missing.append(f"{path}.{name.rpartition('.')[2]}")
                    continue
                saved.append(Saved(site, {name: tensor}, path))
        return saved, missing, problems

    def read(self, config: Config, saved: Sequence[Saved], shared: Mapping[str, Tensor], forms: Forms) -> None:
        problems = []
        for s in saved:
            ((name, value),) = s.tensors.items()
            if value.shape != s.site.weight.shape:
                problems.append(f"{s.path}: {name} is {list(value.shape)}, and the model's {list(s.site.weight.shape)}")
            forms.sites[s.path] = LNTuning(), {"value": value}
        refuse(problems, "This LN_TUNING adapter of PEFT does not fit")

    def route(self, method: Method, site: Site) -> Route | None:
        if not isinstance(method, Replace):
            return None
        if "." not in parameter_path(site):
            return Route("refused", "PEFT has no place for a parameter of the model itself; export to 'merged'")
        if is_norm(site.module):
            return Route("exact", "LN_TUNING, or modules_to_save beside another type")
        return Route("exact", "LORA with bias='all'" if site.parameter == "bias" else "LORA with modules_to_save")

    def write(self, live: Sequence[Live]) -> Written:
        values = {parameter_path(e.site): e.values()["value"] for e in live}
        modules = {parameter_path(e.site).rpartition(".")[0]: e.site.module for e in live}
        made = Written({"peft_type": self.type, "modules_to_save": None}, modules=[*modules])
        for path, module in modules.items():
            for name, t in module.named_parameters(recurse=False):
                value = values.get(f"{path}.{name}", t.detach())
                made.tensors[f"{path}.ln_tuning_layers.{name}"] = value
        return made
